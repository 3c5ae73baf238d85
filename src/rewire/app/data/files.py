"""Files of samples: CSV, Parquet, NumPy's npz, MATLAB's mat."""

from __future__ import annotations

import csv
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewire.app.data.dataset import Dataset
from rewire.app.data.options import FileOptions
from rewire.app.data.tables import Table, make_dataset
from rewire.app.errors import DataError, did_you_mean
from rewire.app.importing import FILE_ENDINGS
from rewire.storage.columns import is_number
from rewire.storage.files import sha256_file
from rewire.storage.reading import brief

__all__ = ["ENDINGS", "USUAL_TARGETS", "load", "needed", "targets_of"]

#: How targets are usually called, in columns and in arrays.
USUAL_TARGETS = ("target", "label", "labels", "class", "y", "Y", "Target", "Label", "Class")
_INPUTS = ("x", "X", "data", "features", "inputs")


def needed(package: str, why: str, extra: str = "data") -> DataError:
    """The error where an optional package is missing."""
    return DataError(
        f"{why} needs {package}, which is not installed: pip install 'torch-rewire[{extra}]'"
    )


def load(path: Path, options: FileOptions) -> Dataset:
    """The samples of a file, and of those that ``options`` name for other parts."""
    given = {"train": path}
    for part, other in (("test", options.test_data), ("validation", options.validation_data)):
        if other is not None:
            given[part] = Path(other)
    parts: dict[str, Table] = {}
    sums: dict[str, str] = {}
    for part, file in given.items():
        if not file.is_file():
            raise DataError(f"cannot read {file}: there is no such file")
        if file.suffix.lower() not in ENDINGS:
            raise DataError(
                f"cannot read {file}: the ending is {file.suffix or 'missing'}, allowed are "
                f"{', '.join(ENDINGS)}"
            )
        try:
            sums[file.name] = sha256_file(file)
            found = ENDINGS[file.suffix.lower()](file, options)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or brief(error)}") from None
        parts[part] = found["train"]
        if part == "train":
            parts |= {name: table for name, table in found.items() if name not in given}
    return make_dataset(path.stem, parts, options, sums)


def targets_of(path: Path | str, names: Iterable[str], options: FileOptions) -> list[str]:
    """The names of the targets: those that were given, or the one that looks like it."""
    there = [str(name) for name in names]
    if options.target is None:
        found = [name for name in USUAL_TARGETS if name in there]
        if found:
            return found[:1]
        last = f"; is it the last one, --target {there[-1]!r}?" if there else ""
        raise DataError(f"{path}: give the column that is to be found with --target{last}")
    wanted = [options.target]
    if options.target not in there:
        wanted = list(dict.fromkeys(part.strip() for part in options.target.split(",")))
    for name in wanted:
        if name not in there:
            hint = did_you_mean(name, there)
            shown = brief(", ".join(there), 200)
            raise DataError(f"--target: {path} has no column {name!r}{hint}; it has {shown}")
    return wanted


def _table(path: Path, frame: Any, options: FileOptions) -> dict[str, Table]:
    frame = frame.rename(columns=str)
    repeated = frame.columns[frame.columns.duplicated()]
    if len(repeated):
        raise DataError(f"{path} has two columns called {repeated[0]!r}")
    targets = targets_of(path, frame.columns, options)
    y = frame[targets if len(targets) > 1 else targets[0]]
    kept = y.to_numpy() if len(targets) > 1 else np.array(y.to_numpy())
    return {"train": Table(frame.drop(columns=targets), kept, targets=tuple(targets))}


#: A number with a decimal comma as a field, where semicolons part fields.
_DECIMAL_COMMA = re.compile(r"(^|;)\s*-?\d+,\d+\s*(;|$)")


def _csv(path: Path, options: FileOptions) -> dict[str, Table]:
    try:
        import pandas
    except ImportError:
        raise needed("pandas", f"reading {path.name}") from None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head, first = (file.readline(1 << 20) for _ in range(2))
        # commas between digits part no fields where there are semicolons
        parting = re.sub(r"(?<=\d),(?=\d)", "", head) if ";" in head else head
        marks = {mark: parting.count(mark) for mark in ",;\t"}
        mark = "\t" if path.suffix.lower() == ".tsv" else max(marks, key=lambda m: marks[m])
        names = next(csv.reader([head], delimiter=mark), [])
        # a first line of numbers is a sample: the columns are called 0, 1, 2, ...
        decimal = "," if mark == ";" and _DECIMAL_COMMA.search(first) else "."
        header = None if names and all(is_number(n.replace(decimal, ".")) for n in names) else 0
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            frame = pandas.read_csv(
                path,
                sep=mark,
                header=header,
                index_col=False,  # None: fields without a name would be taken for those of rows
                skipinitialspace=True,
                encoding="utf-8-sig",
                decimal=decimal,
            )
    except pandas.errors.ParserWarning:
        raise DataError(
            f"cannot read {path}: its rows have more fields than its first line has names; name "
            "every column"
        ) from None
    except (ValueError, UnicodeError, csv.Error) as error:  # what pandas raises is a ValueError
        raise DataError(f"cannot read {path}: {brief(error)}") from None
    return _table(path, frame, options)


def _parquet(path: Path, options: FileOptions) -> dict[str, Table]:
    try:
        import pandas
        import pyarrow
    except ImportError:
        raise needed("pandas and pyarrow", f"reading {path.name}") from None
    try:
        frame = pandas.read_parquet(path, engine="pyarrow")
    except (ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path}: {brief(error)}") from None
    return _table(path, frame, options)


def _npz(path: Path, options: FileOptions) -> dict[str, Table]:
    if not zipfile.is_zipfile(path):
        raise DataError(f"cannot read {path}: it is no npz file, which is a zip archive")
    try:
        with np.load(path, allow_pickle=False) as file:  # nothing of a user is unpickled
            arrays = {name: file[name] for name in file.files}
    except MemoryError:
        raise DataError(f"cannot read {path}: its arrays are larger than the memory") from None
    except (ValueError, zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise DataError(f"cannot read {path}: {brief(error)}") from None
    if {"format", "indptr", "indices", "data", "shape"} <= arrays.keys():
        arrays = _sparse_arrays(path, arrays)
    return _of_arrays(path, arrays, options)


def _sparse_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """A sparse matrix as SciPy writes it; further arrays of the file stay."""
    try:
        from scipy import sparse
    except ImportError:
        raise needed("scipy", f"reading {path.name}") from None
    kinds = np.atleast_1d(arrays["format"]).astype(str).ravel()
    kind = str(kinds[0]) if len(kinds) == 1 else "several formats"
    if kind not in ("csr", "csc"):
        raise DataError(f"cannot read {path}: a sparse matrix in {kind}, allowed are csr and csc")
    make = sparse.csr_array if kind == "csr" else sparse.csc_array
    parts = tuple(arrays[name] for name in ("data", "indices", "indptr"))
    try:
        matrix = make(parts, shape=tuple(int(n) for n in arrays["shape"]))
        matrix.check_format(full_check=True)
    except (ValueError, TypeError) as error:
        raise DataError(f"cannot read {path}: {brief(error)}") from None
    own = {"format", "indptr", "indices", "data", "shape"}
    return {"x": matrix, **{name: a for name, a in arrays.items() if name not in own}}


def _mat(path: Path, options: FileOptions) -> dict[str, Table]:
    try:
        from scipy import io
    except ImportError:
        raise needed("scipy", f"reading {path.name}") from None
    try:
        arrays = io.loadmat(path)
    except NotImplementedError:
        raise DataError(
            f"cannot read {path}: it is of version 7.3; save it with -v7 in MATLAB"
        ) from None
    except Exception as error:  # the reader raises whatever a damaged file makes it do
        raise DataError(f"cannot read {path}: {brief(error) or type(error).__name__}") from None
    found = {name: a for name, a in arrays.items() if not name.startswith("__")}
    return _of_arrays(path, found, options)


def _of_arrays(path: Path, arrays: Mapping[str, Any], options: FileOptions) -> dict[str, Table]:
    """Tables of arrays by the usual names: x and y, or x_train, y_train, x_test, y_test."""
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        options.refuse(f"{path}, which has arrays for training and test,", "target", "test_share")
        return {
            part: _of_pair(path, arrays[f"x_{part}"], arrays[f"y_{part}"], f"y_{part}")
            for part in ("train", "test")
        }
    inputs = next((name for name in _INPUTS if name in arrays), None)
    if inputs is None:
        raise DataError(
            f"{path} has the arrays {brief(', '.join(arrays) or 'none', 200)}; needed are inputs "
            "called x and targets called y, or x_train, y_train, x_test, y_test"
        )
    target = targets_of(path, [name for name in arrays if name != inputs], options)[0]
    return {"train": _of_pair(path, arrays[inputs], arrays[target], target)}


def _of_pair(path: Path, x: Any, y: NDArray[Any], target: str) -> Table:
    if not hasattr(x, "tocsr"):
        x = np.asarray(x)
    if x.ndim < 2 or x.dtype.kind not in "biuf":
        raise DataError(
            f"{path}: the inputs are {x.dtype} of shape {x.shape}, needed are numbers "
            "of shape (samples, features)"
        )
    y = np.asarray(y)
    if y.ndim > 1 and y.shape[1] == 1:
        y = y[:, 0]
    elif y.ndim > 1 and y.shape[0] == 1:
        y = y[0]
    if y.ndim not in (1, 2) or len(y) != x.shape[0]:
        raise DataError(
            f"{path}: {x.shape[0]} samples and targets of shape {y.shape}; needed is one for each"
        )
    shape = x.shape[1:]
    # two or three dimensions of bytes are pixels; three with the colours last are turned
    image = shape if len(shape) in (2, 3) and x.dtype == np.uint8 else None
    if image and len(image) == 3 and image[2] in (1, 3):
        x, image = np.moveaxis(x, 3, 1), (image[2], *image[:2])
        shape = image
    flat = x if x.ndim == 2 else x.reshape(len(x), -1)
    names = (target,) if y.ndim == 1 else tuple(f"{target} {i}" for i in range(y.shape[1]))
    more = tuple(int(n) for n in shape) if len(shape) > 1 else ()
    return Table(flat, y, targets=names, shape=more, image_shape=more if image else None)


#: What reads a file, by its ending.
ENDINGS = dict(zip(FILE_ENDINGS, (_csv, _csv, _parquet, _npz, _mat), strict=True))

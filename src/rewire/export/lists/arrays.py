"""Sparse weights in NumPy's npz files: by row, as coordinates, or each as SciPy writes it.

In one file, the sparse weight NAME has the arrays NAME.shape (of the dense weight), NAME.data and
NAME.indices and NAME.indptr, or NAME.row and NAME.col; every other array is a tensor of the
``state_dict``. A file of SciPy has one matrix without a name; it gets that of the file.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rewire.export.lists.entries import (
    Entries,
    State,
    array_of,
    entries_of,
    others_of,
    put,
    state_of,
)
from rewire.nn.weight.listing import sparse_weights
from rewire.storage import files, reading
from rewire.storage.reading import FileError

__all__ = ["read_folder", "read_npz", "to_scipy", "write_coo", "write_csr", "write_scipy"]

Arrays = dict[str, NDArray[Any]]
_OTHERS = "other_tensors.npz"


def to_scipy(model: nn.Module) -> dict[str, Any]:
    """The sparse weights by name, each as a `scipy.sparse.csr_array` of (rows, cols).

    O(K). Raises ImportError, with the line to type, if SciPy is missing.
    """
    try:
        from scipy import sparse
    except ImportError:
        raise ImportError(
            "to_scipy needs scipy, which is not installed: pip install 'torch-rewire[data]'"
        ) from None

    return {
        name: sparse.csr_array(
            (array_of(e.values), e.cols.numpy(), e.row_ptr().numpy()), shape=e.matrix_shape
        )
        for name, e in entries_of(state_of(model)).items()
    }


def _csr(entries: Entries) -> Arrays:
    wide = max(*entries.matrix_shape, entries.rows.numel()) >= 2**31
    kind = np.int64 if wide else np.int32
    return {
        "data": array_of(entries.values),
        "indices": entries.cols.numpy().astype(kind),
        "indptr": entries.row_ptr().numpy().astype(kind),
    }


def _coo(entries: Entries) -> Arrays:
    kind = np.int64 if max(entries.matrix_shape) >= 2**31 else np.int32
    return {
        "data": array_of(entries.values),
        "row": entries.rows.numpy().astype(kind),
        "col": entries.cols.numpy().astype(kind),
    }


def write_csr(model: nn.Module, path: Path) -> int:
    """Write all weights of a model by row; returns the bytes."""
    return _write_all(model, path, _csr)


def write_coo(model: nn.Module, path: Path) -> int:
    """Write all weights of a model as coordinates; returns the bytes."""
    return _write_all(model, path, _coo)


def _write_all(model: nn.Module, path: Path, lists: Callable[[Entries], Arrays]) -> int:
    state = state_of(model)
    arrays: Arrays = {}
    for name, entries in entries_of(state).items():
        arrays |= {f"{name}.{part}": a for part, a in lists(entries).items()}
        arrays[f"{name}.shape"] = np.array(entries.shape, dtype=np.int64)
    arrays |= {name: array_of(tensor) for name, tensor in others_of(state).items()}
    return _write(path, arrays)


def write_scipy(model: nn.Module, folder: Path) -> int:
    """Write a folder of files that `scipy.sparse.load_npz` reads, NAME.npz for each sparse weight
    as a matrix, and the other tensors in a file of their own; returns the bytes.
    """
    state = state_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    size = 0
    for name, entries in entries_of(state).items():
        matrix = {"format": np.array(b"csr"), "shape": np.array(entries.matrix_shape)}
        size += _write(folder / f"{name}.npz", _csr(entries) | matrix)
    shapes = {
        f"{name}.shape": np.array(w.shape) for name, w in sparse_weights(model) if len(w.shape) != 2
    }
    rest = {name: array_of(tensor) for name, tensor in others_of(state).items()}
    return size + _write(folder / _OTHERS, rest | shapes)


def _write(path: Path, arrays: Arrays) -> int:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    content = file.getbuffer()
    files.write_pieces(path, [content])
    return len(content)


# --- reading --------------------------------------------------------------------------------------


def read_npz(path: Path) -> State:
    """The state in a file: of weights by row or as coordinates, or one matrix of SciPy.

    Raises OSError, FileError, or TopologyError for a shape that no weight has; `entries_of` checks
    the positions. Nothing is unpickled.
    """
    arrays = _arrays(path)
    if "format" in arrays and "data" in arrays:
        state: State = {}
        name = path.name.removesuffix(".npz")
        _put(state, path, name, _of_scipy(path, arrays), None)
        return state
    return _state(path, arrays)


def read_folder(folder: Path) -> State:
    """The state in a folder of files as `write_scipy` writes it."""
    rest = folder / _OTHERS
    others = _arrays(rest) if rest.exists() else {}
    found = sorted(p for p in folder.glob("*.npz") if p.name != _OTHERS)
    if not found:
        raise FileError(f"{folder} has no file NAME.npz with a sparse matrix")
    state: State = {}
    for path in found:
        name = path.name.removesuffix(".npz")
        shape = others.pop(f"{name}.shape", None)
        _put(state, path, name, _of_scipy(path, _arrays(path)), shape)
    return state | _state(rest, others)


def _arrays(path: Path) -> Arrays:
    content = reading.read_bytes(path)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # 1032 is the most that deflate can do: more is a forged directory
            if sum(entry.file_size for entry in archive.infolist()) > 1032 * len(content) + 1024:
                raise FileError(f"{path} is damaged: it is no npz file")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except FileError:
        raise
    except MemoryError:
        raise FileError(f"{path} cannot be read: its arrays are larger than the memory") from None
    except Exception as error:  # NumPy raises whatever a damaged file makes it do
        raise FileError(f"{path} is damaged: it is no npz file ({reading.brief(error)})") from None
    for name, array in found.items():
        if not isinstance(array, np.ndarray):  # NumPy gives bytes for what has another header
            raise FileError(f"{path} is damaged: {name} is no array")
    return found


def _state(path: Path, arrays: Arrays) -> State:
    state: State = {}
    for key in list(arrays):
        name = key.removesuffix(".data")
        if name == key or not {f"{name}.indptr", f"{name}.row"} & arrays.keys():
            continue
        parts = {
            part: arrays.pop(f"{name}.{part}")
            for part in ("data", "indices", "indptr", "row", "col", "shape")
            if f"{name}.{part}" in arrays
        }
        shape = parts.pop("shape", None)
        if shape is None:
            raise FileError(f"{path} is incomplete: it has no {name}.shape")
        _put(state, path, name, parts | {"shape": shape}, shape)
    words = [name for name, array in arrays.items() if array.dtype.kind not in "biufc"]
    if words:
        raise FileError(f"{path}: {words[0]} is {arrays[words[0]].dtype}, allowed are numbers")
    return state | {name: torch.from_numpy(array) for name, array in arrays.items()}


def _of_scipy(path: Path, arrays: Arrays) -> Arrays:
    """The lists of a file of SciPy, of any of its formats that are lists."""
    kind = str(np.atleast_1d(arrays.get("format", np.array("none"))).astype(str).ravel()[0])
    if kind not in ("csr", "csc", "coo"):
        raise FileError(f"{path}: a sparse matrix in {kind}, allowed are csr, csc and coo")
    if kind == "csc":
        shape = np.atleast_1d(arrays.get("shape", np.zeros(0))).ravel()[::-1]
        rows, cols = _positions(path, arrays | {"shape": shape})
        return {"row": cols, "col": rows, "data": arrays["data"], "shape": shape[::-1]}
    return arrays


def _positions(path: Path, lists: Mapping[str, NDArray[Any]]) -> tuple[Any, Any]:
    """Rows and columns of lists by row or of coordinates."""
    names = ("row", "col") if "row" in lists else ("indptr", "indices")
    first, second = (np.asarray(lists.get(name, np.zeros(0, object))) for name in names)
    if any(a.dtype.kind not in "iu" or a.ndim != 1 for a in (first, second)):
        raise FileError(f"{path} is damaged: {names[0]} and {names[1]} must be lists of integers")
    if names[0] == "row":
        return first, second
    counts = np.diff(first.astype(np.int64))
    fits = len(first) and first[0] == 0 and first[-1] == len(second) and (counts >= 0).all()
    if not fits:
        raise FileError(f"{path} is damaged: indptr does not lead through indices")
    rows: NDArray[Any] = np.repeat(np.arange(len(counts)), counts.tolist())
    return rows, second


def _put(state: State, path: Path, name: str, lists: Arrays, shape: NDArray[Any] | None) -> None:
    """Add lists to a state as a sparse weight of ``shape`` (None: that of the matrix)."""
    rows, cols = _positions(path, lists)
    given = lists.get("shape", np.zeros(0)) if shape is None else shape
    sizes = tuple(int(n) for n in np.atleast_1d(given).ravel().tolist())
    values = lists["data"]
    if values.dtype.kind != "f" or values.shape != rows.shape or rows.shape != cols.shape:
        raise FileError(
            f"{path} is damaged: {name} has values {values.dtype} {values.shape} for "
            f"{len(rows)} rows and {len(cols)} columns; needed are as many floats"
        )
    if "indptr" in lists and len(lists["indptr"]) != (sizes or (0,))[0] + 1:
        raise FileError(f"{path} is damaged: indptr of {name} does not fit the shape {sizes}")
    put(state, name, Entries(sizes, _long(rows), _long(cols), torch.from_numpy(values)))


def _long(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))

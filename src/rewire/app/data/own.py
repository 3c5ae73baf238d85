"""Data sets from scikit-learn, from a folder of images, and from functions of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewire.app.data.dataset import Dataset
from rewire.app.data.files import needed
from rewire.app.data.options import FileOptions
from rewire.app.data.tables import Table, make_dataset
from rewire.app.errors import DataError, did_you_mean
from rewire.app.importing import foreign
from rewire.storage.files import sha256_bytes
from rewire.storage.reading import brief

__all__ = ["from_folder", "from_function", "from_sklearn"]

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def from_sklearn(name: str, options: FileOptions) -> Dataset:
    """What ``load_NAME`` or ``fetch_NAME`` of `sklearn.datasets` returns."""
    try:
        from sklearn import datasets
    except ImportError:
        raise needed("scikit-learn", f"--data sklearn:{name}") from None
    loaders = {
        prefix + function.removeprefix(prefix): getattr(datasets, function)
        for prefix in ("load_", "fetch_")
        for function in dir(datasets)
        if function.startswith(prefix)
    }
    found = next((loaders[p + name] for p in ("load_", "fetch_") if p + name in loaders), None)
    if found is None:
        names = sorted(n.partition("_")[2] for n in loaders)
        hint = did_you_mean(name, names)
        raise DataError(f"--data: scikit-learn has no data set {name!r}{hint}")
    try:
        bunch: Any = found()
        x, y = bunch["data"], np.asarray(bunch["target"])
        if not hasattr(x, "shape") or y.ndim < 1:
            raise ValueError("it is no table of numbers with a target for each row")
    except Exception as error:  # a download, or a set that is no table
        raise DataError(
            f"--data sklearn:{name}: cannot be loaded ({type(error).__name__}: {brief(error)})"
        ) from None
    names = [str(n) for n in bunch.get("feature_names", ())]
    words = bunch.get("target_names")
    if words is not None and y.ndim == 1 and y.dtype.kind in "iu" and len(words) > int(y.max()):
        y = np.asarray(words)[y]
    shape = bunch["images"].shape[1:] if "images" in bunch else ()
    image = tuple(int(n) for n in shape) or None
    targets = tuple(f"target {i}" for i in range(y.shape[1])) if y.ndim > 1 else ("target",)
    table = Table(x, y, tuple(names), targets, image or (), image)
    return make_dataset(f"sklearn-{name}", {"train": table}, options, {name: _sum(x, y)})


def _sum(*arrays: Any) -> str:
    """One checksum of arrays, whatever they came from."""
    parts = []
    for array in arrays:
        if hasattr(array, "tocsr"):
            matrix = array.tocsr()
            parts += [matrix.data.tobytes(), matrix.indices.tobytes(), matrix.indptr.tobytes()]
        else:
            values = np.ascontiguousarray(array)
            text = values.dtype.kind in "OU"
            parts.append("\0".join(map(str, values.ravel())).encode() if text else values.tobytes())
    return sha256_bytes(b"".join(parts))


def from_folder(folder: Path, options: FileOptions) -> Dataset:
    """Images in a subfolder for each class; or in train/, test/ and validation/ with such."""
    try:
        from PIL import Image
    except ImportError:
        raise needed("Pillow", f"reading the images in {folder.name}") from None
    named = {part: folder / part for part in ("train", "test", "validation")}
    given = {p: f for p, f in named.items() if f.is_dir()} if named["train"].is_dir() else {}
    given = given or {"train": folder}
    for part, other in (("test", options.test_data), ("validation", options.validation_data)):
        if other is not None:
            given[part] = Path(other)
    parts: dict[str, Table] = {}
    sums: dict[str, str] = {}
    size: tuple[int, int] | None = None
    colours = 1
    read: dict[str, tuple[list[NDArray[np.uint8]], list[str]]] = {}
    for part, place in given.items():
        images: list[NDArray[np.uint8]] = []
        labels: list[str] = []
        for path in sorted(place.glob("*/*")):
            if path.suffix.lower() not in _PICTURES:
                continue
            try:
                with Image.open(path) as opened:
                    if opened.mode.startswith(("I", "F")):  # Pillow would cut off above 255
                        raise ValueError(
                            f"its pixels are of mode {opened.mode}, needed are 8 bits for each "
                            "colour"
                        )
                    picture = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
                    if options.image_size is not None:
                        picture = picture.resize((options.image_size, options.image_size))
                    pixels = np.asarray(picture)
            except Exception as error:  # a damaged picture can raise anything
                raise DataError(f"cannot read {path}: {brief(error)}") from None
            if size is not None and pixels.shape[:2] != size:
                raise DataError(
                    f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, others have "
                    f"{size[1]} x {size[0]}: give --image-size, to which all are resized"
                )
            size, colours = pixels.shape[:2], max(colours, pixels.ndim * 2 - 3)
            images.append(pixels)
            labels.append(path.parent.name)
        if not images:
            raise DataError(f"{place} has no images: needed is a subfolder for each class")
        read[part] = images, labels
    assert size is not None
    for part, (images, labels) in read.items():
        # (samples, colours, height, width); grey pictures among coloured ones have three equal ones
        stack = np.stack(
            [np.broadcast_to(np.atleast_3d(i), (*size, colours)).transpose(2, 0, 1) for i in images]
        )
        shape = (colours, *size) if colours > 1 else size
        x = stack.reshape(len(stack), -1).astype(np.float32) / 255
        parts[part] = Table(x, np.array(labels), ("",) * 0, ("class",), shape, shape)
        sums[part] = _sum(stack, np.array(labels))
    return make_dataset(folder.name, parts, options, sums)


def from_function(source: str, result: Any, options: FileOptions) -> Dataset:
    """What a function of one's own returned, as a `Dataset`.

    Allowed are a `Dataset`; a pair (inputs, targets) of arrays or tensors; a data set of torch that
    has a length; and a tuple, or a dict with the names train, validation and test, of such.
    """
    if isinstance(result, Dataset):
        return result
    parts: Mapping[str, Any]
    if isinstance(result, Mapping):
        parts = result
        if "train" not in parts or not parts.keys() <= {"train", "validation", "test"}:
            raise DataError(
                f"--data: {source!r} returned a dict of {', '.join(map(str, parts))}; allowed are "
                "train, validation and test"
            )
    elif _is_pair(result) or not isinstance(result, tuple | list):
        parts = {"train": result}
    elif len(result) in (2, 3):
        names = ("train", "test") if len(result) == 2 else ("train", "validation", "test")
        parts = dict(zip(names, result, strict=True))
    else:
        raise DataError(
            f"--data: {source!r} returned {len(result)} things; allowed are a training and a test "
            "set, with a validation set between them if there is one"
        )
    tables = {part: _part(source, value) for part, value in parts.items()}
    order: list[str] = [part for part in ("train", "test", "validation") if part in tables]
    sums: dict[str, str] = {part: _sum(tables[part].x, tables[part].y) for part in order}
    name = source.rpartition(":")[2]
    return make_dataset(name, {part: tables[part] for part in order}, options, sums)


def _is_pair(value: Any) -> bool:
    """Whether it is (inputs, targets) and not (training set, test set)."""
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(hasattr(v, "shape") or hasattr(v, "iloc") for v in value)
    )


def _array(value: Any) -> Any:
    """A DataFrame or sparse matrix as it is, anything else as an array."""
    if isinstance(value, Tensor):  # NumPy has no bfloat16
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
    return value if hasattr(value, "iloc") or hasattr(value, "tocsr") else np.asarray(value)


def _part(source: str, value: Any) -> Table:
    if not _is_pair(value):
        if not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
            raise DataError(
                f"--data: {source!r} returned a {type(value).__name__}; allowed are pairs of "
                "arrays (inputs, targets) and data sets of torch that have a length"
            )
        what = f"--data: the samples of {source!r} are no pairs (inputs, target) of one shape"
        with foreign(lambda said: DataError(f"{what}: {said}")):
            pairs = [value[i] for i in range(len(value))]
            value = (
                np.stack([np.asarray(x) for x, *_ in pairs]),
                np.stack([np.asarray(y) for _, y, *_ in pairs]),
            )
    x, y = map(_array, value)
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    targets = tuple(f"target {i}" for i in range(y.shape[1])) if y.ndim > 1 else ("target",)
    if hasattr(x, "iloc") or hasattr(x, "tocsr"):
        return Table(x, y, targets=targets)
    shape: Sequence[int] = x.shape[1:] if x.ndim > 2 else ()
    if x.ndim < 2 or y.ndim < 1 or len(x) != len(y):
        raise DataError(
            f"--data: {source!r} returned inputs of shape {x.shape} and targets of shape {y.shape}"
        )
    return Table(x.reshape(len(x), -1), y, targets=targets, shape=tuple(shape))

"""CIFAR-10 in its Python files, read by an unpickler that makes arrays and words only."""

from __future__ import annotations

import hashlib
import io
import lzma
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rewire.app.data.dataset import Dataset
from rewire.app.data.download import Progress
from rewire.app.data.public import PublicFile, fetch
from rewire.app.data.rows import ByteRows
from rewire.app.errors import DataError
from rewire.storage import reading

__all__ = ["ARCHIVE", "load", "unpickle"]

FOLDER = "cifar-10-batches-py"
ARCHIVE = PublicFile(
    "cifar-10-python.tar.gz",
    170498071,
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
#: md5 of each file, as its authors give them.
SUMS = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BYTES = 40 * reading.MEBIBYTE  # most of one file; they have 31 MB


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    """Makes what CIFAR-10's files hold: dicts, lists, words, numbers, arrays of bytes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such file needs")
        if name == "_reconstruct":
            from numpy._core import multiarray

            return multiarray._reconstruct
        return super().find_class(module, name)


def unpickle(content: bytes) -> Any:
    """What a pickled file of CIFAR-10 holds; raises `pickle.UnpicklingError` for all else."""
    return _Unpickler(io.BytesIO(content), encoding="latin1").load()


def _read(name: str, content: bytes, where: Path) -> tuple[NDArray[np.uint8], list[int]]:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != SUMS[name]:
        raise DataError(
            f"{where}: md5 of {name} is {found}, expected {SUMS[name]}; replace the file, or leave "
            "out --data-dir to have it downloaded"
        )
    try:
        batch = unpickle(content)
        return np.asarray(batch["data"], np.uint8).reshape(-1, 3072), list(batch["labels"])
    except (pickle.UnpicklingError, KeyError, ValueError, EOFError) as error:
        raise DataError(f"{where}: {name} cannot be read: {reading.brief(error)}") from None


def _from_folder(folder: Path) -> dict[str, tuple[NDArray[np.uint8], list[int]]]:
    """The files as they are, or packed by xz."""
    found = {}
    for name in SUMS:
        plain, packed = folder / name, folder / f"{name}.xz"
        path = plain if plain.is_file() else packed
        if not path.is_file():
            raise DataError(f"--data-dir: {name} not found in {folder}")
        try:
            content = reading.read_bytes(path, _BYTES)
            if path is packed:
                unpacked = lzma.LZMADecompressor().decompress(content, _BYTES)
                content = unpacked
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        except (lzma.LZMAError, reading.FileError) as error:
            raise DataError(f"cannot read {path}: {reading.brief(error)}") from None
        found[name] = _read(name, content, path)
    return found


def _from_archive(path: Path) -> dict[str, tuple[NDArray[np.uint8], list[int]]]:
    found = {}
    with tarfile.open(path, "r:gz") as archive:  # its sum is right
        for member in archive:
            name = Path(member.name).name
            file = archive.extractfile(member) if name in SUMS else None
            if file is not None:
                found[name] = _read(name, file.read(_BYTES), path)
    return found


def load(
    data_dir: Path | None = None, mirror: str | None = None, progress: Progress | None = None
) -> Dataset:
    """50,000 training and 10,000 test images, kept as bytes.

    Standardised channels, and training images that are moved and mirrored, are the default.
    """
    folder = None
    if data_dir is not None:
        places = (
            data_dir,
            data_dir / FOLDER,
            data_dir / "cifar-10",
            data_dir / "cifar-10" / FOLDER,
        )
        folder = next(
            (p for p in places if any((p / f"test_batch{e}").is_file() for e in ("", ".xz"))), None
        )
    if folder is not None:
        files = _from_folder(folder)
    else:
        files = _from_archive(fetch(ARCHIVE, "cifar-10", data_dir, mirror, progress))
    scale = torch.tensor(1 / 255)

    def rows(names: list[str]) -> ByteRows:
        values = np.concatenate([files[name][0] for name in names])
        return ByteRows(torch.from_numpy(values), torch.tensor(0.0), scale)

    train = [name for name in SUMS if name != "test_batch"]
    return Dataset(
        "cifar-10",
        rows(train),
        torch.tensor([label for name in train for label in files[name][1]]),
        rows(["test_batch"]),
        torch.tensor(files["test_batch"][1]),
        CLASSES,
        (3, 32, 32),
        dict(SUMS),
        standardise=True,
        augment=("crop", "flip"),
    )

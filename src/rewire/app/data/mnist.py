"""MNIST and Fashion-MNIST: four idx files, from the user's folder or downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewire.app.data import idx
from rewire.app.data.dataset import Dataset
from rewire.app.data.download import Progress, download, is_whole
from rewire.app.data.public import cache_folder
from rewire.app.errors import DataError
from rewire.storage import reading
from rewire.storage.files import sha256_bytes


@dataclass(frozen=True)
class IdxFile:
    """One file: size and sha256 of the official .gz; sha256 and shape of its content."""

    name: str
    size: int
    sha256: str
    content_sha256: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """A data set in MNIST's format, and where the public has it."""

    name: str
    mirror: str
    classes: tuple[str, ...]
    files: Mapping[str, IdxFile]


def _files(
    sizes: Sequence[int], packed: Sequence[str], contents: Sequence[str]
) -> dict[str, IdxFile]:
    """The four files; ``packed`` and ``contents`` are sha256 of the .gz and of its content."""
    parts = (
        ("train_x", "train-images-idx3-ubyte.gz", (60000, 28, 28)),
        ("train_y", "train-labels-idx1-ubyte.gz", (60000,)),
        ("test_x", "t10k-images-idx3-ubyte.gz", (10000, 28, 28)),
        ("test_y", "t10k-labels-idx1-ubyte.gz", (10000,)),
    )
    return {
        part: IdxFile(name, size, archive, content, shape)
        for (part, name, shape), size, archive, content in zip(
            parts, sizes, packed, contents, strict=True
        )
    }


MNIST = Family(
    name="mnist",
    mirror="https://ossci-datasets.s3.amazonaws.com/mnist/",
    classes=tuple("0123456789"),
    files=_files(
        sizes=(9912422, 28881, 1648877, 4542),
        packed=(
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
        contents=(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
)

FASHION_MNIST = Family(
    name="fashion-mnist",
    mirror="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    files=_files(
        sizes=(26421880, 29515, 4422102, 5148),
        packed=(
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
        contents=(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
)


def read(path: Path, file: IdxFile) -> NDArray[np.uint8]:
    """Read and check one file. Its content decides: it may have been compressed anew."""
    size = idx.content_size(file.shape)
    try:
        # Compressed badly it may be a little larger than what is inside, but not much.
        packed = reading.read_bytes(path, 2 * size + reading.MEBIBYTE)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except reading.FileError as error:
        raise DataError(f"{error}; it cannot be {file.name}") from None
    packed_sum = sha256_bytes(packed)
    wrong = f"{path}: sha256 {packed_sum}, expected {file.sha256}"
    advice = "replace the file, or leave out --data-dir to have it downloaded"
    try:
        content = idx.unzip(packed, size)
        values = idx.parse(content, file.shape)
    except idx.IdxError as error:
        raise DataError(f"{wrong}: {error}; {advice}") from None
    if packed_sum != file.sha256 and sha256_bytes(content) != file.content_sha256:
        raise DataError(f"{wrong}: well formed, but not the official file; {advice}")
    return values


def _local_folder(family: Family, data_dir: Path) -> Path:
    """The folder with the four files: `data_dir/<name>`, or `data_dir` itself."""
    inside = data_dir / family.name
    folder = inside if inside.is_dir() else data_dir
    missing = [file.name for file in family.files.values() if not (folder / file.name).is_file()]
    if missing:
        raise DataError(
            f"--data-dir {data_dir}: {', '.join(missing)} not found in {folder}; needed are "
            "the four "
            f"*-ubyte.gz files of {family.name}, there or in a subfolder named {family.name}"
        )
    return folder


def _downloaded_folder(family: Family, mirror: str | None, progress: Progress | None) -> Path:
    """The cache folder of this data set, after fetching what it lacks."""
    folder = cache_folder() / family.name
    base = (mirror or family.mirror).rstrip("/") + "/"
    help_line = (
        "without a network give --data-dir FOLDER with the four *-ubyte.gz files of "
        f"{family.name}; "
        "another source is chosen with --mirror URL"
    )
    for file in family.files.values():
        path = folder / file.name
        if is_whole(path, sha256=file.sha256, size=file.size):
            continue  # anything else there is ours and damaged: fetched anew
        download(
            base + file.name,
            path,
            sha256=file.sha256,
            size=file.size,
            help_line=help_line,
            progress=progress,
        )
    return folder


def load(
    family: Family,
    data_dir: Path | None = None,
    mirror: str | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Load one of the family; pixels scaled to [0, 1]."""
    folder = (
        _local_folder(family, data_dir)
        if data_dir
        else _downloaded_folder(family, mirror, progress)
    )
    arrays = {part: read(folder / file.name, file) for part, file in family.files.items()}

    def images(part: str) -> Tensor:
        pixels = arrays[part]
        return torch.from_numpy(pixels.reshape(len(pixels), -1).astype(np.float32)).div_(255.0)

    return Dataset(
        name=family.name,
        train_x=images("train_x"),
        train_y=torch.from_numpy(arrays["train_y"].astype(np.int64)),
        test_x=images("test_x"),
        test_y=torch.from_numpy(arrays["test_y"].astype(np.int64)),
        classes=family.classes,
        image_shape=(28, 28),
        sha256={file.name: file.sha256 for file in family.files.values()},
    )

"""Where samples come from: data sets by name, files, scikit-learn, and functions of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from rewire.app.data import digits, mnist
from rewire.app.data.dataset import Dataset
from rewire.app.data.download import Progress
from rewire.app.data.options import FileOptions
from rewire.app.errors import DataError

__all__ = ["REGISTERED", "Registered", "available", "check", "load"]

Loader = Callable[[Path | None, str | None, Progress | None], Dataset]


@dataclass(frozen=True)
class Registered:
    """A data set by name: what it is, where it comes from, and what loads it."""

    summary: str
    source: str
    load: Loader


def _embedded(data_dir: Path | None, mirror: str | None, progress: Progress | None) -> Dataset:
    return digits.load()  # comes with the package: no folder, no network


REGISTERED: dict[str, Registered] = {
    "digits": Registered("1,797 images of 8 x 8, 10 digits", "part of the package", _embedded),
    "mnist": Registered(
        "70,000 images of 28 x 28, 10 digits", "download", partial(mnist.load, mnist.MNIST)
    ),
    "fashion-mnist": Registered(
        "70,000 images of 28 x 28, 10 kinds of clothes",
        "download",
        partial(mnist.load, mnist.FASHION_MNIST),
    ),
}


def available() -> list[str]:
    """Names that `load` knows."""
    return list(REGISTERED)


def check(source: str) -> None:
    """Raise DataError for what is neither a name, nor a path, nor a function; loads nothing."""
    if source not in REGISTERED:
        near = get_close_matches(source, REGISTERED, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(
            f"--data: unknown name {source!r}{hint}; allowed are {', '.join(REGISTERED)}"
        )


def load(
    source: str,
    *,
    data_dir: Path | None = None,
    mirror: str | None = None,
    progress: Progress | None = None,
    options: FileOptions | None = None,
) -> Dataset:
    """Load what ``source`` says, see `check`.

    Args:
        source: a name of `available`.
        data_dir: the folder to take the files of a name from, instead of a download.
        mirror: the folder to download from.
        progress: told about downloads.
        options: about samples of one's own.
    """
    check(source)
    options = options or FileOptions()
    options.refuse(source, "target", "task", "test_share", "test_data", "validation_data")
    options.refuse(source, "split_seed", "image_size")
    return REGISTERED[source].load(data_dir, mirror, progress)

"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rewire.app.data import digits, mnist
from rewire.app.data.dataset import Dataset
from rewire.app.data.download import Progress
from rewire.app.errors import DataError

Loader = Callable[[Path | None, str | None, Progress | None], Dataset]


def _embedded(data_dir: Path | None, mirror: str | None, progress: Progress | None) -> Dataset:
    return digits.load()  # comes with the package: no folder, no network


LOADERS: dict[str, Loader] = {
    "digits": _embedded,
    "mnist": partial(mnist.load, mnist.MNIST),
    "fashion-mnist": partial(mnist.load, mnist.FASHION_MNIST),
}


def available() -> list[str]:
    """Names that `load` knows."""
    return list(LOADERS)


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    mirror: str | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Load a data set by name, from `data_dir` if given, else from the package or by download."""
    if name not in LOADERS:
        raise DataError(f"unknown data set {name!r}; allowed are {', '.join(LOADERS)}")
    return LOADERS[name](data_dir, mirror, progress)

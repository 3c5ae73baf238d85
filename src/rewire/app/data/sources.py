"""Where samples come from: data sets by name, files, scikit-learn, and functions of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rewire.app.data import cifar10, digits, files, mnist, own, skfeature, speech, stdlib
from rewire.app.data.dataset import Dataset
from rewire.app.data.download import Progress
from rewire.app.data.options import FileOptions
from rewire.app.errors import DataError, did_you_mean
from rewire.app.importing import call_with, foreign, is_path, load_object

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


def _standard_library(
    data_dir: Path | None, mirror: str | None, progress: Progress | None
) -> Dataset:
    return stdlib.load(data_dir)


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
    "cifar-10": Registered("60,000 colour images of 32 x 32, 10 kinds", "download", cifar10.load),
    "fsdd": Registered(
        "3,000 spoken digits, 39 features each 10 ms; takes 0 to 4 are tests",
        "--data-dir",
        speech.fsdd,
    ),
    "fsdd-speaker": Registered(
        "the same; tests are all of one speaker",
        "--data-dir",
        partial(speech.fsdd, held_out=speech.HELD_OUT),
    ),
    "isolet": Registered(
        "1,560 spoken letters, 617 features, 26 classes", "download", skfeature.loader("isolet")
    ),
    "madelon": Registered(
        "2,600 samples, 500 features of which 20 tell, 2 classes",
        "download",
        skfeature.loader("madelon"),
    ),
    "leukemia": Registered(
        "72 patients, 7,070 genes, 2 classes", "download", skfeature.loader("leukemia")
    ),
    "timit": Registered(
        "spoken sentences, one of 61 phones at each step", "--data-dir (licensed)", speech.timit
    ),
    "stdlib": Registered(
        "characters of Python's standard library; which one comes next",
        "your Python",
        _standard_library,
    ),
}


def available() -> list[str]:
    """Names that `load` knows."""
    return list(REGISTERED)


def check(source: str) -> None:
    """Raise DataError for what is neither a name, nor a path, nor a function; loads nothing."""
    if source in REGISTERED or is_path(source) or _function(source) is not None:
        return
    hint = did_you_mean(source, REGISTERED)
    raise DataError(
        f"--data: unknown name {source!r}{hint}; allowed are {', '.join(REGISTERED)}, a file "
        f"({', '.join(files.ENDINGS)}), a folder of images, sklearn:NAME, or "
        "path.to.module:function"
    )


def _function(source: str) -> tuple[str, str] | None:
    """Module and function, or "sklearn" and the name of a data set."""
    module, colon, name = source.partition(":")
    return (module, name) if colon and module and name and "/" not in source else None


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
        source: a name of `available`, a path, "sklearn:NAME", or "module:function".
        data_dir: the folder to take the files of a name from, instead of a download.
        mirror: the folder to download from.
        progress: told about downloads.
        options: about samples of one's own.
    """
    check(source)
    options = options or FileOptions()
    if source in REGISTERED:
        options.refuse(source, "target", "task", "test_share", "test_data", "validation_data")
        options.refuse(source, "split_seed", "image_size")
        return REGISTERED[source].load(data_dir, mirror, progress)
    if is_path(source):
        path = Path(source)
        if path.is_dir():
            options.refuse(source, "target", "task")
            return own.from_folder(path, options)
        options.refuse(source, "image_size")
        return files.load(path, options)
    options.refuse(source, "target", "test_data", "validation_data", "image_size")
    found = _function(source)
    assert found is not None  # check refuses everything else
    if found[0] == "sklearn":
        return own.from_sklearn(found[1], options)
    function = load_object("--data", source)
    with foreign(lambda said: DataError(f"--data: {source!r} failed: {said}")):
        result = call_with(function, {"data_dir": data_dir})
    return own.from_function(source, result, options)

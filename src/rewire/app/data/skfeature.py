"""Wide tables that papers on sparse training use, in the files of the scikit-feature repository."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewire.app.data.dataset import Dataset
from rewire.app.data.download import Progress
from rewire.app.data.files import needed
from rewire.app.data.options import FileOptions
from rewire.app.data.public import PublicFile, fetch
from rewire.app.data.splitting import stratified
from rewire.app.data.tables import Table, make_dataset

__all__ = ["FILES", "load", "loader"]

_AT = (
    "https://raw.githubusercontent.com/jundongl/scikit-feature/"
    "48cffad4e88ff4b9d2f1c7baffb314d1b3303792/skfeature/data/"
)

FILES = {
    name: PublicFile(file, size, sha256, _AT + file)
    for name, file, size, sha256 in (
        (
            "isolet",
            "Isolet.mat",
            3652673,
            "ea73c69b1342a7def8199458e53a70307a83d557eceb2579863dda57c3ccd2b1",
        ),
        (
            "madelon",
            "madelon.mat",
            1496573,
            "7dc9c9ff8d902651948e2df7f9cb6ed38c5d91e4c4159914cecb1ddbc7def12c",
        ),
        (
            "leukemia",
            "leukemia.mat",
            154743,
            "eb92382fb77c968864cb0a92a2c77acde7f88ba7fe5fd5a64b98184e3a05269d",
        ),
    )
}

#: Training samples at the beginning of the file, where the source says so; the rest is for tests.
OFFICIAL = {"madelon": 2000}
#: Share of the others that is the test set.
TEST_SHARE = 0.3


def load(
    name: str, data_dir: Path | None, mirror: str | None, progress: Progress | None
) -> Dataset:
    """One of the sets. Madelon has the division of its source; the others one that is fixed here:
    30 % of each class, drawn once.
    """
    try:
        from scipy import io
    except ImportError:
        raise needed("scipy", f"--data {name}") from None
    file = FILES[name]
    folder = "skfeature" if data_dir is not None and (data_dir / "skfeature").is_dir() else name
    path = fetch(file, folder, data_dir, mirror, progress)
    content: Any = io.loadmat(path)
    x, y = content["X"].astype(np.float32), content["Y"].ravel()
    if name in OFFICIAL:
        train, test = torch.arange(len(y)).split([OFFICIAL[name], len(y) - OFFICIAL[name]])
    else:
        _, numbers = np.unique(y, return_inverse=True)
        generator = torch.Generator().manual_seed(0)
        labels = torch.from_numpy(numbers)
        train, test = stratified(labels, round(TEST_SHARE * len(y)), generator)
    parts = {
        part: Table(x[index.numpy()], y[index.numpy()], targets=("Y",))
        for part, index in (("train", train), ("test", test))
    }
    return make_dataset(name, parts, FileOptions(task="classification"), {file.name: file.sha256})


def loader(name: str) -> Callable[[Path | None, str | None, Progress | None], Dataset]:
    """What loads one of the sets."""
    return partial(load, name)

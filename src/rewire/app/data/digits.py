"""The UCI handwritten digits (Alpaydin, Kaynak): 1797 images of 8 x 8, part of the package."""

from __future__ import annotations

import gzip
from importlib import resources

import numpy as np
import torch
from numpy.typing import NDArray

from rewire.app.data.dataset import Dataset
from rewire.app.errors import DataError
from rewire.storage.files import sha256_bytes

FILE = "digits.csv.gz"
SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
SIZE = 57523  # bytes
MAXIMUM = 16  # a pixel counts the ink of a 4 x 4 block


def read() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """All images as (1797, 64) and their digits, in the order of the file."""
    try:
        with (resources.files("rewire.app.data") / "embedded" / FILE).open("rb") as file:
            packed = file.read(SIZE + 1)
    except OSError as error:
        raise DataError(
            f"{FILE} inside the installed package: {error.strerror}; reinstall rewire"
        ) from None
    found = sha256_bytes(packed)
    if found != SHA256:
        raise DataError(
            f"{FILE} inside the installed package is damaged: sha256 {found}, expected {SHA256}; "
            "reinstall rewire"
        )
    table = np.loadtxt(
        gzip.decompress(packed).decode("ascii").splitlines(), delimiter=",", dtype=np.uint8
    )
    return table[:, :-1], table[:, -1]


def is_test(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The fixed split: every fifth sample of each class, in file order, is test."""
    chosen = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        chosen[np.flatnonzero(labels == digit)[4::5]] = True
    return chosen


def load() -> Dataset:
    """The digits as a data set: 1442 training and 355 test images, pixels scaled to [0, 1]."""
    pixels, digits = read()
    test = is_test(digits)
    x = torch.from_numpy(pixels.astype(np.float32) / MAXIMUM)
    y = torch.from_numpy(digits.astype(np.int64))
    chosen = torch.from_numpy(test)
    return Dataset(
        name="digits",
        train_x=x[~chosen],
        train_y=y[~chosen],
        test_x=x[chosen],
        test_y=y[chosen],
        classes=tuple(str(digit) for digit in range(10)),
        image_shape=(8, 8),
        sha256={FILE: SHA256},
    )

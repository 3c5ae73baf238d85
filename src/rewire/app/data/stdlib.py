"""Characters of the Python standard library: a text that every machine has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rewire.app.data.dataset import Dataset
from rewire.app.errors import DataError
from rewire.storage.files import sha256_bytes

__all__ = ["CHARACTERS", "STEPS", "encode", "load"]

#: The characters, in the order of their numbers; the last stands for all others.
CHARACTERS = "\n" + "".join(map(chr, range(32, 127))) + "\ufffd"
#: Characters of a sample.
STEPS = 128
#: Every so many modules, in the order of their names, one is for tests.
TEST_EVERY = 10


def encode(text: str) -> Tensor:
    """Numbers of the characters, int64; tabs are four spaces."""
    codes = np.array([ord(c) for c in text.expandtabs(4)], np.int64)
    numbers = np.where((codes >= 32) & (codes < 127), codes - 31, len(CHARACTERS) - 1)
    return torch.from_numpy(np.where(codes == 10, 0, numbers))


def load(folder: Path | None = None) -> Dataset:
    """The modules of the standard library that are single files, in samples of `STEPS` characters.

    Each character is to be told from those before it in its sample. The text is that of the Python
    that runs: its checksum is kept, and a run goes on with the same text only.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[str]] = {"train": [], "test": []}
    for number, path in enumerate(sorted(folder.glob("*.py"))):
        part = "test" if number % TEST_EVERY == TEST_EVERY - 1 else "train"
        texts[part].append(path.read_text("utf-8", errors="replace"))
    sums: dict[str, str] = {}
    samples: dict[str, Tensor] = {}
    for part, several in texts.items():
        text = "\n".join(several)
        sums[part] = sha256_bytes(text.encode())
        tokens = encode(text)
        count = (len(tokens) - 1) // STEPS
        if count < 1:
            raise DataError(f"--data stdlib: {folder} has no source files of Python")
        # one more than a sample reads: the last character is only told
        samples[part] = tokens[: count * STEPS + 1]

    def inputs(part: str) -> Tensor:
        return samples[part][:-1].view(-1, STEPS)

    def targets(part: str) -> Tensor:
        return samples[part][1:].view(-1, STEPS)

    return Dataset(
        "stdlib",
        inputs("train"),
        targets("train"),
        inputs("test"),
        targets("test"),
        tuple(CHARACTERS),
        sha256=sums,
        tokens=len(CHARACTERS),
    )

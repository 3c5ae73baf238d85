"""CIFAR-10 from the folder ``cifar-10-batches-py`` as published (files plain or .xz), for the
benchmarks here.
"""

from __future__ import annotations

import io
import lzma
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Arrays(pickle.Unpickler):
    """Reads the published files, which are pickles of arrays, and nothing else."""

    ALLOWED = frozenset(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
        for name in ("_reconstruct", "ndarray", "dtype")
    ) | {("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"the file wants {module}.{name}: not one of CIFAR-10's")
        return super().find_class(module, name)


def _batch(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    packed = folder / f"{name}.xz"
    raw = lzma.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    found = _Arrays(io.BytesIO(raw), encoding="latin1").load()
    return found["data"].reshape(-1, 3, 32, 32), np.asarray(found["labels"])


def cifar10(folder: Path, train: int = 50000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train_x, train_y, test_x, test_y): float32 (n, 3, 32, 32) standardised by channel, int64."""
    parts = [_batch(folder, f"data_batch_{i}") for i in range(1, 1 + -(-train // 10000))]
    x = torch.from_numpy(np.concatenate([p[0] for p in parts])[:train]).float() / 255
    y = torch.from_numpy(np.concatenate([p[1] for p in parts])[:train])
    test = _batch(folder, "test_batch")
    test_x = torch.from_numpy(test[0]).float() / 255
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return (x - mean) / std, y.long(), (test_x - mean) / std, torch.from_numpy(test[1]).long()

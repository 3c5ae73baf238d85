"""Rows of an array or of a sparse matrix as tensors; a sparse matrix is never made dense whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

__all__ = ["Batches", "Rows", "floating"]

#: Numbers of a dense piece of rows at most, where a whole data set passes through a network.
PIECE_NUMBERS = 1 << 22


def floating(dtype: Any) -> torch.dtype:
    """The dtype that an estimator computes in for data of a NumPy dtype."""
    return torch.float32 if dtype == np.float32 else torch.float64


class Rows:
    """The rows of ``x``, an array or a CSR matrix (samples, features)."""

    def __init__(self, x: Any, dtype: torch.dtype) -> None:
        self.x, self.dtype = x, dtype
        self.sparse = sparse.issparse(x)
        if not self.sparse:  # torch takes no array that nobody may write to
            x = np.require(x, requirements=["C", "W"])
        self.whole = None if self.sparse else torch.from_numpy(x).to(dtype)

    def __len__(self) -> int:
        return int(self.x.shape[0])

    @property
    def features(self) -> int:
        """The number of columns."""
        return int(self.x.shape[1])

    def take(self, chosen: Tensor) -> Tensor:
        """The rows with these numbers (int64), as a dense tensor."""
        if self.whole is not None:
            return self.whole[chosen]
        return torch.from_numpy(self.x[chosen.numpy()].toarray()).to(self.dtype)

    def pieces(self, features: int) -> Iterator[Tensor]:
        """All rows in order, in pieces of at most `PIECE_NUMBERS` numbers for ``features``."""
        step = max(1, PIECE_NUMBERS // max(features, 1))
        for start in range(0, len(self), step):
            yield self.take(torch.arange(start, min(start + step, len(self))))


class Batches:
    """The batches of `Rows` that a method may go through again and again to see activations."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Tensor]:
        return self.rows.pieces(self.rows.features)

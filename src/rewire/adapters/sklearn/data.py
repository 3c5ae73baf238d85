"""Rows of an array or of a sparse matrix as tensors; a sparse matrix is never made dense whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils.validation import _check_sample_weight, validate_data
from torch import Tensor, nn

__all__ = ["Batches", "Rows", "checked", "rows_of", "weight_of", "weights_of"]

#: The most numbers in a dense piece of rows, where a whole data set passes through a network.
PIECE_NUMBERS = 1 << 22


def floating(dtype: Any) -> torch.dtype:
    """The dtype that an estimator computes in for data of a NumPy dtype."""
    return torch.float32 if dtype == np.float32 else torch.float64


class Rows:
    """The rows of ``x``, an array or a CSR matrix (samples, features)."""

    def __init__(self, x: Any, dtype: torch.dtype) -> None:
        self.x, self.dtype = x, dtype
        self.sparse = sparse.issparse(x)
        if not self.sparse:  # torch accepts only arrays that can be written to
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


def weight_of(x: Any, given: Any) -> np.ndarray | None:
    """The weight of each sample, checked; None where none was given."""
    if given is None:
        return None
    weight: np.ndarray = _check_sample_weight(given, x, dtype=np.float64, ensure_non_negative=True)
    return weight


def weights_of(weight: np.ndarray | None, dtype: torch.dtype) -> Tensor | None:
    """Sample weights as the loop takes them: with a mean of 1."""
    if weight is None:
        return None
    total = weight.sum()
    if not total > 0:
        raise ValueError("sample_weight must have a positive sum")
    return torch.from_numpy(weight * (len(weight) / total)).to(dtype)


def checked(
    estimator: BaseEstimator, x: Any, y: Any, *, reset: bool, **options: Any
) -> tuple[Any, Any]:
    """X (an array or CSR matrix of float32 or float64) and y, as scikit-learn checks them."""
    found: tuple[Any, Any] = validate_data(
        estimator, x, y, accept_sparse="csr", dtype=(np.float64, np.float32), reset=reset, **options
    )
    return found


def rows_of(x: Any, network: nn.Module | None = None) -> Rows:
    """The rows of checked data, in the dtype of the network that training goes on with."""
    dtype = floating(x.dtype) if network is None else next(network.parameters()).dtype
    return Rows(x, dtype)

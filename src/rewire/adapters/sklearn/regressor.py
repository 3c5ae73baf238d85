"""`SparseMLPRegressor`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score
from torch import Tensor, nn

from rewire.adapters.sklearn.base import SparseMLP, checked, rows_of, weight_of, weights_of
from rewire.adapters.sklearn.data import Rows
from rewire.adapters.sklearn.training import Loss

__all__ = ["SparseMLPRegressor", "scaled"]


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the mean over the outputs, of each sample."""
    return (outputs - targets).square().mean(1) / 2


def scaled(y: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, by weight; 1 for that of a constant one."""
    mean = np.average(y, axis=0, weights=weight)
    spread = np.sqrt(np.average((y - mean) ** 2, axis=0, weights=weight))
    return mean, np.where(spread > 1e-12 * np.abs(mean), spread, 1.0)


@dataclass(kw_only=True, eq=False, repr=False)
class SparseMLPRegressor(RegressorMixin, SparseMLP):  # type: ignore[misc]
    """A multi-layer perceptron whose connections training finds, as a scikit-learn regressor.

    Parameters, attributes, data and cost are those of `SparseMLPClassifier`, but for classes. It
    minimises half the mean squared error. Targets, (samples,) or (samples, outputs), are
    standardised inside, by the data of the first call.
    """

    hidden_layer_sizes: Any = field(default=(100,), kw_only=False)

    def _loss(self) -> Loss:
        return squared_error

    def _outputs(self) -> int:
        return len(self._mean)

    def _score_of(self, network: nn.Module, x: Rows, y: Tensor, weight: Any) -> float:
        found = self._forward(network, x)
        return float(r2_score(y.numpy(), found, sample_weight=weight))

    def _targets(
        self, X: Any, y: Any, sample_weight: Any, first: bool, reset: bool
    ) -> tuple[Any, np.ndarray, np.ndarray | None]:
        x, y = checked(self, X, y, reset=reset, multi_output=True, y_numeric=True)
        weight = weight_of(x, sample_weight)
        column = y.reshape(len(y), -1).astype(np.float64)
        if first:
            self._flat = y.ndim == 1
            self._mean, self._spread = scaled(column, weight)
        elif column.shape[1] != len(self._mean):
            raise ValueError(f"y has {column.shape[1]} columns, and had {len(self._mean)} before")
        return x, (column - self._mean) / self._spread, weight

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SparseMLPRegressor:
        """Train on X (samples, features) and y (samples,) or (samples, outputs)."""
        self._check_parameters()
        first = not (self.warm_start and hasattr(self, "network_"))
        x, targets, weight = self._targets(X, y, sample_weight, first, True)
        self._fit(x, targets, weight, stratify=None)
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> SparseMLPRegressor:
        """Train for one more epoch, on X and y, at the learning rate ``learning_rate_init``."""
        self._check_parameters()
        first = not hasattr(self, "network_")
        x, targets, weight = self._targets(X, y, sample_weight, first, first)
        rows = rows_of(x, getattr(self, "network_", None))
        self._continue(
            rows, torch.from_numpy(targets).to(rows.dtype), weights_of(weight, rows.dtype)
        )
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The values for X, of the shape that y had."""
        rows = self._rows(X)
        found: np.ndarray = self._forward(self.network_, rows) * self._spread + self._mean
        return found[:, 0] if self._flat else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

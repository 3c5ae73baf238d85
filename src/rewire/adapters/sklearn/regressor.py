"""`SparseMLPRegressor`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score
from torch import Tensor, nn

from rewire.adapters.sklearn.base import SparseMLP
from rewire.adapters.sklearn.data import Rows, checked, rows_of, weight_of, weights_of
from rewire.adapters.sklearn.training import Loss

__all__ = ["SparseMLPRegressor", "scaled"]


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the mean squared error over the outputs, for each sample."""
    return (outputs - targets).square().mean(1) / 2


def scaled(y: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, by weight; 1 for that of a constant one."""
    mean = np.average(y, axis=0, weights=weight)
    spread = np.sqrt(np.average((y - mean) ** 2, axis=0, weights=weight))
    return mean, np.where(spread > 1e-12 * np.abs(mean), spread, 1.0)


@dataclass(kw_only=True, eq=False, repr=False)
class SparseMLPRegressor(RegressorMixin, SparseMLP):  # type: ignore[misc]
    """A multi-layer perceptron whose connections training finds, as a scikit-learn regressor.

    Parameters, attributes, data and cost are those of `SparseMLPClassifier`, except what concerns
    classes. It minimises half the mean squared error. It standardises the targets, (samples,) or
    (samples, outputs), by mean and spread of those that the first call trains on.
    """

    hidden_layer_sizes: Any = field(default=(100,), kw_only=False)

    _mean: Any = field(init=False)
    _spread: np.ndarray = field(init=False)

    def _loss(self) -> Loss:
        return squared_error

    def _outputs(self) -> int:
        return len(self._mean)

    def _score_of(self, network: nn.Module, x: Rows, y: Tensor, weight: Any) -> float:
        found = self._forward(network, x)
        return float(r2_score(y.numpy(), found, sample_weight=weight))

    def _checked(
        self, X: Any, y: Any, sample_weight: Any, first: bool, reset: bool
    ) -> tuple[Any, np.ndarray, np.ndarray | None]:
        x, y = checked(self, X, y, reset=reset, multi_output=True, y_numeric=True)
        columns = y.reshape(len(y), -1).astype(np.float64)
        if first:
            self._flat, self._mean = y.ndim == 1, None
        elif columns.shape[1] != len(self._mean):
            raise ValueError(f"y has {columns.shape[1]} columns, and had {len(self._mean)} before")
        return x, columns, weight_of(x, sample_weight)

    def _scale(self, y: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if self._mean is None:
            self._mean, self._spread = scaled(y, weight)
        return self._mean, self._spread

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SparseMLPRegressor:
        """Train on X (samples, features) and y (samples,) or (samples, outputs)."""
        self._check_parameters()
        first = not (self.warm_start and hasattr(self, "network_"))
        x, columns, weight = self._checked(X, y, sample_weight, first, True)
        self._fit(x, columns, weight, scale=self._scale)
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> SparseMLPRegressor:
        """Train for one more epoch, on X and y, at the learning rate ``learning_rate_init``."""
        self._check_parameters()
        first = not hasattr(self, "network_")
        x, columns, weight = self._checked(X, y, sample_weight, first, first)
        mean, spread = self._scale(columns, weight)
        rows = rows_of(x, getattr(self, "network_", None))
        self._continue(
            rows,
            torch.from_numpy((columns - mean) / spread).to(rows.dtype),
            weights_of(weight, rows.dtype),
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

"""`ConnectivitySelector`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.feature_selection import SelectorMixin
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from rewire.adapters.sklearn.base import SparseMLP
from rewire.adapters.sklearn.classifier import cross_entropy
from rewire.adapters.sklearn.data import Rows, checked, weight_of
from rewire.adapters.sklearn.regressor import scaled, squared_error
from rewire.adapters.sklearn.settings import is_whole
from rewire.adapters.sklearn.training import Loss

__all__ = ["ConnectivitySelector"]


#: Floats with more different values than this are no classes, even if all of them are whole.
MOST_CLASSES = 50


def _are_values(y: np.ndarray) -> bool:
    return y.dtype.kind == "f" and len(np.unique(y)) > MOST_CLASSES


@dataclass(kw_only=True, eq=False, repr=False)
class ConnectivitySelector(SelectorMixin, SparseMLP):  # type: ignore[misc]
    """Selects the features to which a sparse network, while it trains, gives its connections.

    It trains a network as `SparseMLPClassifier` does (where y holds classes) or as
    `SparseMLPRegressor`, with the same parameters, and keeps the features with the strongest
    connections, as in QuickSelection (Atashgahi et al., Machine Learning 2022). Classes are words,
    whole numbers, and floats that are whole and have at most 50 different values.

    Args:
        n_features_to_select: how many to keep: a number, a share between 0 and 1, or None for all
            features at or above the mean.
        importance: "strength", the sum of the magnitudes of the connections that leave a feature,
            or "counts", their number; the other one breaks ties.

    The others are those of `SparseMLPClassifier`. Standardise the features before: a strength
    compares features of one scale.
    """

    n_features_to_select: int | float | None = field(default=None, kw_only=False)
    importance: str = "strength"

    def _loss(self) -> Loss:
        return cross_entropy if self._classes else squared_error

    def _outputs(self) -> int:
        return self._targets

    def _score_of(self, network: nn.Module, x: Rows, y: Tensor, weight: Any) -> float:
        outputs = self._forward(network, x)
        if self._classes:
            return float(np.average(outputs.argmax(1) == y.numpy(), weights=weight))
        error = ((outputs - y.numpy()) ** 2).mean(1)
        return -float(np.average(error, weights=weight))

    def _wanted(self, features: int) -> int | None:
        """How many features to keep; None for those at or above the mean."""
        given = self.n_features_to_select
        if given is None:
            return None
        if is_whole(given):
            if 1 <= given <= features:
                return int(given)
        elif 0 < given <= 1:
            return max(1, round(given * features))
        raise ValueError(
            f"n_features_to_select must be None, a whole number from 1 to {features} or a share "
            f"above 0 and at most 1, not {given!r}"
        )

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ConnectivitySelector:
        """Train on X (samples, features) and y, classes or values, and choose the features."""
        self._check_parameters()
        if self.importance not in ("counts", "strength"):
            raise ValueError(f"importance must be 'counts' or 'strength', not {self.importance!r}")
        x, y = checked(self, X, y, reset=True, multi_output=True)
        self._wanted(x.shape[1])
        weight = weight_of(x, sample_weight)
        self._classes = type_of_target(y) in ("binary", "multiclass") and not _are_values(y)
        if self._classes:
            targets: np.ndarray
            classes, targets = np.unique(y, return_inverse=True)
            self._targets = len(classes)
        else:
            targets = np.asarray(y, dtype=np.float64).reshape(len(y), -1)
            self._targets = targets.shape[1]
        by: dict[str, Any] = {"stratify": targets} if self._classes else {"scale": scaled}
        self._fit(x, targets, weight, **by)
        return self

    def _get_support_mask(self) -> np.ndarray:
        check_is_fitted(self, "network_")
        counts, strength = self.feature_counts_, self.feature_importances_
        first, second = (counts, strength) if self.importance == "counts" else (strength, counts)
        wanted = self._wanted(len(first))
        if wanted is None:
            found: np.ndarray = first >= first.mean()
            return found
        order = np.lexsort((second, first))[::-1]
        mask = np.zeros(len(first), dtype=bool)
        mask[order[:wanted]] = True
        return mask

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags

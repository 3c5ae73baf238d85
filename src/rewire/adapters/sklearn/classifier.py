"""`SparseMLPClassifier`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor, nn

from rewire.adapters.sklearn.base import SparseMLP
from rewire.adapters.sklearn.data import Rows, checked, rows_of, weight_of, weights_of
from rewire.adapters.sklearn.training import Loss

__all__ = ["SparseMLPClassifier", "cross_entropy"]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each sample."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


@dataclass(kw_only=True, eq=False, repr=False)
class SparseMLPClassifier(ClassifierMixin, SparseMLP):  # type: ignore[misc]
    """A multi-layer perceptron whose connections training finds, as a scikit-learn classifier.

    The names of the parameters are those of `sklearn.neural_network.MLPClassifier` where they mean
    the same.

    Args:
        hidden_layer_sizes: neurons of each hidden layer, a number or a sequence.
        method: any of `rewire.methods.available` that needs no validation score.
        method_params: its hyper-parameters, a dict; see ``rewire methods NAME``.
        density, connections: the budget of the whole network, as a share of all possible
            connections or as their number; at most one of them. By default a tenth.
        distribution: how layers share the budget: "erk", "er" or "uniform".
        limits: most connections of a neuron, of an input and of a block, a `rewire.budget.Limits`.
        activation: "relu", "tanh", "logistic" or "identity".
        solver: "adam", "adamw", "sgd", "rmsprop", or "auto" for the one that suits the method.
        learning_rate_init: the first learning rate; None for one that suits solver and method.
        learning_rate: "cosine" lets it fall to 0 over ``max_epochs``; "constant".
        alpha: weight decay of the optimizer. Methods that decay would mislead refuse it.
        batch_size: samples of a step; "auto" for 200, or all if there are fewer.
        max_epochs: passes over the data; "auto" for at least 20 passes and 1,000 steps.
        shuffle: draw the order of the samples anew in each epoch.
        early_stopping: hold ``validation_fraction`` of the samples out, end the training where
            their score has not risen by ``tol`` for ``n_iter_no_change`` epochs, and keep the
            network that had the best score.
        warm_start: `fit` goes on with the network of the last call.
        n_jobs: threads of a step; None for torch's number, or one for small networks; -1 for all
            cores.
        random_state: seeds everything; same seed, same network, whatever the number of threads.
        verbose: print the loss of each epoch.
        class_weight: weights of the classes, a dict or "balanced".

    Attributes:
        classes_, n_features_in_, feature_names_in_, n_iter_, n_outputs_, n_layers_: as in
            scikit-learn.
        network_: the trained network, a `torch.nn.Sequential`.
        feature_counts_, feature_importances_: see the base class.
        loss_, loss_curve_, validation_scores_, best_validation_score_: of the training; the last
            two are None without early stopping.

    X is an array, a DataFrame of pandas or polars, or a SciPy sparse matrix, of which only the rows
    of a batch are made dense. Float32 data is computed in float32, all other data in float64. Scale
    the features (`sklearn.preprocessing.StandardScaler`, or `MaxAbsScaler` for sparse data).

    Cost: that of the connections there are, beside a dense copy of a batch of X; O(connections)
    memory. A pickle holds the network as a safetensors file.
    """

    hidden_layer_sizes: Any = field(default=(100,), kw_only=False)
    class_weight: Any = None

    def _loss(self) -> Loss:
        return cross_entropy

    def _outputs(self) -> int:
        return len(self.classes_)

    def _score_of(self, network: nn.Module, x: Rows, y: Tensor, weight: Any) -> float:
        right = self._forward(network, x).argmax(1) == y.numpy()
        return float(np.average(right, weights=weight))

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SparseMLPClassifier:
        """Train on X (samples, features) and the classes y (samples,)."""
        self._check_parameters()
        x, y = checked(self, X, y, reset=True)
        check_classification_targets(y)
        had = getattr(self, "classes_", None)
        self.classes_, targets = np.unique(y, return_inverse=True)
        if self.warm_start and had is not None and not np.array_equal(had, self.classes_):
            self.classes_ = had
            raise ValueError(
                f"warm_start=True goes on with the classes {had}, and y has {np.unique(y)}"
            )
        weight = self._sample_weight(x, y, sample_weight)
        self._fit(x, targets, weight, stratify=targets)
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> SparseMLPClassifier:
        """Train for one more epoch, on X and y. The first call must say all ``classes``.

        The learning rate stays ``learning_rate_init``, because nobody knows where training ends.
        """
        self._check_parameters()
        first = not hasattr(self, "classes_")
        if first and classes is None:
            raise ValueError("classes must be given to the first call of partial_fit")
        if self.class_weight == "balanced":
            raise ValueError(
                "class_weight='balanced' needs all data: give partial_fit a dict, see "
                "sklearn.utils.class_weight.compute_class_weight"
            )
        x, y = checked(self, X, y, reset=first)
        check_classification_targets(y)
        if first:
            self.classes_ = np.unique(classes)
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(
                f"classes={classes} are not those of the first call of partial_fit, {self.classes_}"
            )
        unknown = np.setdiff1d(y, self.classes_)
        if unknown.size:
            raise ValueError(f"y has the classes {unknown}, which are not among {self.classes_}")
        targets = torch.from_numpy(np.searchsorted(self.classes_, y))
        rows = rows_of(x, getattr(self, "network_", None))
        weight = weights_of(self._sample_weight(x, y, sample_weight), rows.dtype)
        self._continue(rows, targets, weight)
        return self

    def _sample_weight(self, x: Any, y: Any, given: Any) -> np.ndarray | None:
        weight = weight_of(x, given)
        if self.class_weight is None:
            return weight
        by_class: np.ndarray = compute_sample_weight(self.class_weight, y)
        return by_class if weight is None else weight * by_class

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, (samples, classes), in the order of ``classes_``."""
        rows = self._rows(X)
        found = torch.from_numpy(self._forward(self.network_, rows)).softmax(1)
        return np.asarray(found)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Logarithms of `predict_proba`."""
        rows = self._rows(X)
        return np.asarray(torch.from_numpy(self._forward(self.network_, rows)).log_softmax(1))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each sample, (samples,)."""
        rows = self._rows(X)
        found: np.ndarray = self.classes_[self._forward(self.network_, rows).argmax(1)]
        return found

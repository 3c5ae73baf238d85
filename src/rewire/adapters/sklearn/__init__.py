"""Multi-layer perceptrons with a connection budget as scikit-learn estimators."""

from rewire.adapters.sklearn.classifier import SparseMLPClassifier
from rewire.adapters.sklearn.regressor import SparseMLPRegressor
from rewire.adapters.sklearn.selector import ConnectivitySelector

__all__ = ["ConnectivitySelector", "SparseMLPClassifier", "SparseMLPRegressor"]

"""scikit-learn estimators with a connection budget (the extra ``sklearn``)."""

from __future__ import annotations

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "rewire.sklearn needs scikit-learn: pip install 'torch-rewire[sklearn]'"
    ) from error

from rewire.adapters.sklearn import ConnectivitySelector, SparseMLPClassifier, SparseMLPRegressor

__all__ = ["ConnectivitySelector", "SparseMLPClassifier", "SparseMLPRegressor"]

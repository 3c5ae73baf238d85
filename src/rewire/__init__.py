"""rewire: train deep networks under a connection budget, truly sparsely."""

from rewire import budget, methods, nn, ops, schedules
from rewire._version import __version__
from rewire.nn import densify, param_groups, sparse_weights, sparsify, summary

__all__ = [
    "__version__",
    "budget",
    "densify",
    "methods",
    "nn",
    "ops",
    "param_groups",
    "schedules",
    "sparse_weights",
    "sparsify",
    "summary",
]

"""rewire: train deep networks under a connection budget, truly sparsely."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from rewire._version import __version__

if TYPE_CHECKING:  # all but `export`, which imports other parts of the package
    from rewire import budget, distributed, ema, formats, methods, nn, ops, posterior, schedules
    from rewire.export.read import load
    from rewire.nn.convert.cut import to_sparse
    from rewire.nn.convert.densify import densify
    from rewire.nn.convert.sparsify import sparsify
    from rewire.nn.finetune.adapt import adapt
    from rewire.nn.finetune.adapter import Adapter, load_adapter
    from rewire.nn.frozen.freeze import freeze
    from rewire.nn.inspect.summary import summary
    from rewire.nn.optimizers.groups import param_groups
    from rewire.nn.weight.listing import sparse_weights

__all__ = [
    "Adapter",
    "__version__",
    "adapt",
    "budget",
    "densify",
    "distributed",
    "ema",
    "export",
    "formats",
    "freeze",
    "load",
    "load_adapter",
    "methods",
    "nn",
    "ops",
    "param_groups",
    "posterior",
    "schedules",
    "sparse_weights",
    "sparsify",
    "summary",
    "to_sparse",
]

_FROM_NN = frozenset(
    {
        "Adapter",
        "adapt",
        "densify",
        "freeze",
        "load_adapter",
        "param_groups",
        "sparse_weights",
        "sparsify",
        "summary",
        "to_sparse",
    }
)


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `rewire --help` and `rewire --version` should not.
    if name not in __all__:
        raise AttributeError(f"module 'rewire' has no attribute {name!r}")
    home = "rewire.nn" if name in _FROM_NN else "rewire.export.read" if name == "load" else None
    found = getattr(importlib.import_module(home), name) if home else None
    value = importlib.import_module(f"rewire.{name}") if found is None else found
    globals()[name] = value
    return value


if "torch" in sys.modules:
    # torch.export.load needs the operators to be registered, and with torch imported already this
    # takes little time.
    importlib.import_module("rewire.ops")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

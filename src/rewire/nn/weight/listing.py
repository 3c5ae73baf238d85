"""The sparse weights of a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rewire.nn.weight.pool import SparseWeight

__all__ = ["sparse_weights"]


def sparse_weights(model: nn.Module) -> Iterator[tuple[str, SparseWeight]]:
    """Every pool of ``model`` once, with its name (``"0.weight"``), in module order; shared ones by
    first name.
    """
    for name, module in model.named_modules():
        if isinstance(module, SparseWeight):
            yield name, module

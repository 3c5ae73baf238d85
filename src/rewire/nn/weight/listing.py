"""The sparse weights of a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rewire.nn.weight.pool import SparseWeight

__all__ = ["sparse_weights"]


def sparse_weights(model: nn.Module) -> Iterator[tuple[str, SparseWeight]]:
    """Every sparse weight of ``model`` once, with its (first) name, such as ``"0.weight"``, in
    module order.
    """
    for name, module in model.named_modules():
        if isinstance(module, SparseWeight):
            yield name, module

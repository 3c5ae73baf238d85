"""A layer of each kind within a model, with inputs for it."""

from __future__ import annotations

from torch import Tensor, nn

from twins import made


def wrapped(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model with the layer inside, whose forward is that of the layer."""
    layer, args = made(name)
    model = nn.ModuleDict({"layer": layer})
    model.forward = lambda *a: model["layer"](*a)  # type: ignore[method-assign, assignment]
    return model, args

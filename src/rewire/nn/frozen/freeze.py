"""`freeze`: a copy of a model for inference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rewire.nn.convert import attached
from rewire.nn.convert.counts import matches
from rewire.nn.convert.kinds import join, sparse_kind_of
from rewire.nn.convert.replacing import layers_of, swap
from rewire.nn.frozen import quantize
from rewire.nn.frozen.layers import FROZEN
from rewire.nn.frozen.quantize import Values
from rewire.nn.frozen.weight import FrozenWeight
from rewire.nn.weight.listing import sparse_weights
from rewire.nn.weight.pool import SparseWeight

__all__ = ["freeze"]


def freeze(model: nn.Module, values: Values | Mapping[str, Values] = "float") -> nn.Module:
    """A copy of ``model`` for inference, in eval mode and without gradients.

    Its sparse layers become frozen ones: the values in order, without slots, and the columns in 16
    bits where they fit. They compute the same, use less memory, and are faster above all for few
    rows; `torch.compile` and `torch.export` take them. Other layers are copied as they are, and so
    are hooks. ``model`` stays as it is, also in the middle of training.

    Args:
        values: what values are kept as: "float" (in the weight's dtype, exactly), "int8" (a scale
            for each row) or "ternary" (a scale, its negative and 0 for each row; exact after the
            method ternary). A dict gives one for each pattern of names of weights; the first
            pattern that matches counts, and the rest is "float". `rewire.nn.frozen_weights` lists
            the weights with the error that this makes.

    Raises ValueError for a model without sparse weights, a layer whose class is not one of
    `rewire.nn`, one with a parametrization or an assigned forward, and a pattern that matches no
    weight. Cost: O(K log K) time.
    """
    given: dict[str, Values] = {"*": values} if isinstance(values, str) else dict(values)
    for kind in given.values():
        quantize.check(kind)
    names = [name for name, _ in sparse_weights(model)]
    if not names:
        frozen = any(isinstance(module, FrozenWeight) for module in model.modules())
        raise ValueError(
            "the model is frozen already"
            if frozen
            else "the model has no sparse weights: make it sparse with rewire.sparsify first"
        )
    unused = [p for p in given if p != "*" and not any(matches(n, p) for n in names)]
    if unused:
        raise ValueError(f"no sparse weight is called {unused[0]!r}: there are {', '.join(names)}")
    # Copies are without the hooks of methods and optimizers.
    model = copy.deepcopy(model).eval().requires_grad_(False)
    _check(model)
    found = {name: layer for name, layer, _ in layers_of(model, sparse_kind_of)}
    made: dict[int, nn.Module] = {}  # what layers share stays shared

    def frozen_child(name: str, child: nn.Module) -> nn.Module:
        if isinstance(child, SparseWeight):
            kind: Values = next((k for p, k in given.items() if matches(name, p)), "float")
            return made.setdefault(id(child), FrozenWeight(child, kind))
        return frozen_layer(name, child) if type(child) in FROZEN else child

    def frozen_layer(name: str, layer: nn.Module) -> nn.Module:
        new: Any = FROZEN[type(layer)]
        twin: nn.Module = new.__new__(new)
        # Everything that belongs to the layer, hooks and additions too, goes along.
        twin.__dict__ |= layer.__dict__
        children = {n: c for n, c in layer._modules.items() if c is not None}
        twin.__dict__["_modules"] = {n: frozen_child(join(name, n), c) for n, c in children.items()}
        return twin

    with torch.no_grad():
        return swap(model, found, lambda name: frozen_layer(name, found[name]))


def _check(model: nn.Module) -> None:
    """Raise ValueError if a sparse weight of the model cannot be frozen."""
    covered: set[int] = set()
    for name, layer, _ in layers_of(model, sparse_kind_of):
        where = name or "the model"
        if type(layer) not in FROZEN:
            raise ValueError(
                f"{where} is a {type(layer).__name__}, a class of its own: rewire.nn has no frozen "
                "layer that computes the same"
            )
        attached.check_sparse(name, layer)
        covered |= {id(weight) for _, weight in sparse_weights(layer)}
    for name, weight in sparse_weights(model):
        if id(weight) not in covered:
            raise ValueError(f"{name} is a sparse weight that belongs to no layer of rewire.nn")

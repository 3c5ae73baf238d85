"""The connections and units of each layer that take part while a network trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewire.methods import Method
from rewire.nn import SparseLinear

__all__ = ["Structure", "layer_counts", "structure"]

_LAYERS = (nn.Linear, SparseLinear)


@dataclass(frozen=True)
class Structure:
    """By weight: connections, and outputs with connections in and (but at the end) out."""

    connections: dict[str, int]
    units: dict[str, int]


@torch.no_grad()
def structure(model: nn.Module, method: Method | None = None) -> Structure:
    """Count what takes part in the function now, of a stack of linear layers, dense or sparse.

    ``method`` is the one that is attached: it knows gates and thresholds. A unit whose gate is off
    takes its connections with it, in and out. Cost: O(K) for sparse layers, O(M) for dense ones.
    """
    masks = {} if method is None else method.active_masks()
    gates = {} if method is None else method.active_units()
    connections: dict[str, int] = {}
    units: dict[str, int] = {}
    # the layer below: its weight, which of its outputs have a connection in, and which are on
    below: tuple[str, Tensor, Tensor | None] | None = None
    for path, layer in model.named_modules():
        if not isinstance(layer, _LAYERS):
            continue
        name, on = f"{path}.weight", gates.get(path)
        if isinstance(layer, SparseLinear):
            weight = layer.weight
            active = masks.get(name, weight.rows >= 0)
            connections[name] = int(active.sum())
            reached = _marked(weight.rows[active], layer.out_features)
            read = _marked(weight.cols[active], layer.in_features)
        else:
            mask = masks.get(name, layer.weight != 0)  # parametrized weights are computed here
            if on is not None:
                mask = mask & on.unsqueeze(1)
            if below is not None and below[2] is not None:
                mask = mask & below[2]
            connections[name], reached, read = int(mask.sum()), mask.any(1), mask.any(0)
        if below is not None:
            units[below[0]] = int((below[1] & read).sum())
        below = name, reached, on
    if below is not None:
        units[below[0]] = int(below[1].sum())
    return Structure(connections, units)


def _marked(index: Tensor, size: int) -> Tensor:
    found = torch.zeros(size, dtype=torch.bool, device=index.device)
    found[index.long()] = True
    return found


@torch.no_grad()
def layer_counts(model: nn.Module) -> dict[str, int]:
    """Connections of each linear layer by weight; of dense ones the nonzero entries."""
    return {
        f"{n}.weight": m.weight.connections
        if isinstance(m, SparseLinear)
        else int(torch.count_nonzero(m.weight))
        for n, m in model.named_modules()
        if isinstance(m, _LAYERS)
    }

"""The connections and units of each layer that take part while a network trains."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewire.methods import Method
from rewire.nn import SparseLinear, SparseWeight, sparse_weights
from rewire.nn.convert.kinds import KINDS, Kind, join
from rewire.nn.convert.replacing import layers_of

__all__ = ["Structure", "layer_counts", "structure"]

_LAYERS = (nn.Linear, SparseLinear)


@dataclass(frozen=True)
class Structure:
    """By weight: connections, and outputs with connections in and (but at the end) out.

    Only in a stack of linear layers it is known what reads an output; in other networks an output
    with connections in counts.
    """

    connections: dict[str, int]
    units: dict[str, int]


@torch.no_grad()
def structure(model: nn.Module, method: Method | None = None, *, stack: bool = True) -> Structure:
    """Count what takes part in the function now.

    ``method`` is the one that is attached: it knows gates and thresholds. A unit whose gate is off
    takes its connections with it, in and, in a ``stack`` of linear layers, out. Cost: O(K) for
    sparse layers, O(M) for dense ones.
    """
    masks = {} if method is None else method.active_masks()
    gates = {} if method is None else method.active_units()
    return (_of_stack if stack else _of_layers)(model, masks, gates)


def _of_stack(model: nn.Module, masks: dict[str, Tensor], gates: dict[str, Tensor]) -> Structure:
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


def _of_layers(model: nn.Module, masks: dict[str, Tensor], gates: dict[str, Tensor]) -> Structure:
    connections: dict[str, int] = {}
    units: dict[str, int] = {}
    for name, layer, weight in _weights(model):
        if isinstance(weight, SparseWeight):
            active = masks.get(name, weight.rows >= 0)
            connections[name] = int(active.sum())
            units[name] = int(_marked(weight.rows[active], weight.matrix_shape[0]).sum())
            continue
        mask = masks.get(name, weight != 0).flatten(1)
        on = gates.get(layer)
        if on is not None and len(on) == len(mask):
            mask = mask & on.unsqueeze(1)
        connections[name], units[name] = int(mask.sum()), int(mask.any(1).sum())
    return Structure(connections, units)


def _weights(model: nn.Module) -> Iterator[tuple[str, str, SparseWeight | Tensor]]:
    """Name, name of the layer, and weight, of all that are or can be sparse.

    Parametrized weights are computed.
    """
    for name, pool in sparse_weights(model):
        yield name, name.rpartition(".")[0], pool

    def kind_of(layer: nn.Module) -> Kind | None:
        return next((kind for kind in KINDS if isinstance(layer, kind.dense)), None)

    for path, layer, kind in layers_of(model, kind_of):
        for name, weight in kind.weights(layer).items():
            yield join(path, name), path, weight


def _marked(index: Tensor, size: int) -> Tensor:
    found = torch.zeros(size, dtype=torch.bool, device=index.device)
    found[index.long()] = True
    return found


@torch.no_grad()
def layer_counts(model: nn.Module, names: Collection[str] | None = None) -> dict[str, int]:
    """Connections of each weight, of dense ones the nonzero entries; of those in ``names`` only."""
    return {
        name: weight.connections
        if isinstance(weight, SparseWeight)
        else int(torch.count_nonzero(weight))
        for name, _, weight in _weights(model)
        if names is None or name in names
    }

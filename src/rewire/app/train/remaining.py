"""What is left of a network while it trains: the connections and the units of each layer that take
part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewire.methods import Method
from rewire.methods.differentiable.targets import GATE
from rewire.nn import SparseLinear

__all__ = ["Structure", "layer_counts", "structure"]

_LAYERS = (nn.Linear, SparseLinear)


@dataclass(frozen=True)
class Structure:
    """By name of the weight: connections, and units (outputs) with a connection in and, but in the
    last layer, out.
    """

    connections: dict[str, int]
    units: dict[str, int]


@torch.no_grad()
def structure(model: nn.Module, method: Method | None = None) -> Structure:
    """What takes part in the function now, of a stack of linear layers, dense or sparse.

    ``method`` is the one that is attached. A unit whose gate is off takes its connections with
    it, in and out. Cost: O(K) for sparse layers, O(M) for dense ones.
    """
    counts = {} if method is None else method.connections()
    layers = [(f"{n}.weight", m) for n, m in model.named_modules() if isinstance(m, _LAYERS)]
    connections: dict[str, int] = {}
    units: dict[str, int] = {}
    # the layer below, and which of its outputs have a connection in
    before: tuple[str, Tensor] | None = None
    gate_below: Tensor | None = None
    for name, layer in layers:
        gate = _gate(layer)
        connections[name], reached, read = _ends(
            name, layer, method, counts.get(name), gate, gate_below
        )
        if before is not None:
            units[before[0]] = int((before[1] & read).sum())
        before, gate_below = (name, reached), gate
    if before is not None:
        units[before[0]] = int(before[1].sum())
    return Structure(connections, units)


def _ends(
    name: str,
    layer: nn.Module,
    method: Method | None,
    count: int | None,
    gate: Tensor | None,
    gate_below: Tensor | None,
) -> tuple[int, Tensor, Tensor]:
    """Connections of a layer, which outputs have one, which inputs have one; without those that a
    gate shuts off.

    ``count`` is how many the method says the weight has.
    """
    if isinstance(layer, SparseLinear):
        weight = layer.weight
        slots = weight.active()
        # L1, Top-KAST: what is small takes no part
        if count is not None and count < weight.connections:
            slots = slots[weight.values.detach()[slots].abs().topk(count).indices]
        return (
            slots.numel(),
            _marked(weight.rows[slots], layer.out_features),
            _marked(weight.cols[slots], layer.in_features),
        )
    assert isinstance(layer, nn.Linear)
    mask = layer.weight != 0  # parametrized ones are computed here
    if (
        count is not None
        and count < int(mask.sum())
        and (masks := getattr(method, "masks", None)) is not None
    ):
        mask = masks()[name]  # quantized in the forward pass only
    if gate is not None:
        mask = mask & gate.unsqueeze(1)
    if gate_below is not None:
        mask = mask & gate_below
    return int(mask.sum()), mask.any(1), mask.any(0)


def _gate(layer: nn.Module) -> Tensor | None:
    """Which outputs of the layer their gate leaves on, (n) bool; None without a gate."""
    gate = layer._modules.get(GATE)
    return None if gate is None else gate(layer.weight) != 0


def _marked(index: Tensor, size: int) -> Tensor:
    found = torch.zeros(size, dtype=torch.bool, device=index.device)
    found[index.long()] = True
    return found


@torch.no_grad()
def layer_counts(model: nn.Module) -> dict[str, int]:
    """Connections of each linear layer by name of the weight: of sparse ones, and the nonzero
    entries of dense ones.
    """
    return {
        f"{n}.weight": m.weight.connections
        if isinstance(m, SparseLinear)
        else int(torch.count_nonzero(m.weight))
        for n, m in model.named_modules()
        if isinstance(m, _LAYERS)
    }

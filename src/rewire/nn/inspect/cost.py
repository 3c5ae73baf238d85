"""What a network costs: parameters, bytes, multiply-adds, for dense and sparse layers alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from rewire.nn.forward.modes import evaluating
from rewire.nn.forward.tensors import first_input, first_tensor
from rewire.nn.layers.adapted import Adapted
from rewire.nn.layers.attention import SparseMultiheadAttention
from rewire.nn.layers.conv import SparseConv1d, SparseConv2d, SparseConv3d
from rewire.nn.layers.linear import SparseLinear
from rewire.nn.layers.recurrent import SparseGRU, SparseLSTM, SparseRNN
from rewire.nn.weight.pool import SparseWeight

__all__ = ["Cost", "LayerCost", "cost"]

_SPARSE_CONV = (SparseConv1d, SparseConv2d, SparseConv3d)
_RECURRENT = (nn.RNNBase, SparseRNN, SparseLSTM, SparseGRU)
_ATTENTION = (nn.MultiheadAttention, SparseMultiheadAttention)
_COUNTED = (nn.Linear, SparseLinear, _ConvNd, *_SPARSE_CONV, *_RECURRENT, *_ATTENTION)


@dataclass(frozen=True)
class LayerCost:
    """One layer: outputs (neurons, channels), connections (weights that are not 0), and
    multiply-adds of one sample.
    """

    name: str
    kind: str
    units: int
    connections: int
    multiply_adds: int


@dataclass(frozen=True)
class Cost:
    """A whole network.

    parameters: trained numbers, with the values of sparse weights.
    bytes: of the ``state_dict``, with the positions of sparse weights.
    multiply_adds: of one sample, in layers with weights; in a dense layer zeros count as well.
    """

    parameters: int
    bytes: int
    multiply_adds: int
    layers: tuple[LayerCost, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain numbers, strings, dicts and lists."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}


def cost(model: nn.Module, x: Tensor) -> Cost:
    """The cost of ``model`` for inputs like ``x`` (a batch); runs it once, in eval mode.

    Does not count attention's products of queries, keys and values, activations and norms. May be
    called while a method trains the model: the weights are those that the layers use now, and a
    weight that a gate or threshold has set to 0 is not a connection.
    """
    positions: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            y = first_tensor(output)
            assert y is not None  # layers with weights return a tensor
            features = y.shape[1] if isinstance(module, (_ConvNd, *_SPARSE_CONV)) else y.shape[-1]
            uses = y.numel() // max(features, 1)
            if isinstance(module, _ConvTransposeNd):
                x = first_input(module, args, kwargs)
                uses = x.numel() // x.shape[1]
            positions[name] = positions.get(name, 0) + uses

        return hook

    counted = ((n, m) for n, m in model.named_modules() if isinstance(m, _COUNTED))
    found = [(name, module) for name, module in counted if not _within_attention(model, name)]
    handles = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in found]
    try:
        with evaluating(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    layers = []
    for name, module in found:
        stored = active = 0
        for weight in _weights(module):
            if isinstance(weight, SparseWeight):
                stored += weight.connections
                active += weight.connections
            else:
                stored += weight.numel()
                active += int(torch.count_nonzero(weight))
        uses = positions.get(name, 0) // max(len(x), 1)
        layers.append(
            LayerCost(name or "model", type(module).__name__, _units(module), active, stored * uses)
        )
    tensors = (t for t in model.state_dict().values() if isinstance(t, Tensor))
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
        multiply_adds=sum(layer.multiply_adds for layer in layers),
        layers=tuple(layers),
    )


def _within_attention(model: nn.Module, name: str) -> bool:
    """Whether the layer is the output projection of an attention layer, which counts with that."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return name != "" and isinstance(parent, _ATTENTION)


def _weights(module: nn.Module) -> Iterator[Tensor | SparseWeight]:
    """The weights of a layer as it uses them, of all layers and directions of a recurrent one."""
    # The difference of an adapted layer is a layer of its own.
    pools = [child for child in module.modules() if isinstance(child, SparseWeight)]
    if pools and not isinstance(module, Adapted):
        yield from pools
    elif isinstance(module, nn.MultiheadAttention):
        inputs = module.in_proj_weight, module.q_proj_weight, module.k_proj_weight
        weights = (*inputs, module.v_proj_weight, module.out_proj.weight)
        yield from (weight for weight in weights if weight is not None)  # stacked, or three
    elif isinstance(module, nn.RNNBase):
        yield from (p for name, p in module.named_parameters() if name.startswith("weight"))
    else:
        weight = module.weight  # a parametrized one is computed here
        assert isinstance(weight, Tensor)
        yield weight


def _units(module: nn.Module) -> int:
    for name in ("out_features", "out_channels", "hidden_size", "embed_dim"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return 0

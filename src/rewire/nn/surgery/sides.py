"""The layers from which units can be cut: tensors that hold units, and attributes that count
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from rewire.nn.weight.pool import SparseWeight

__all__ = [
    "RECURRENT",
    "Axis",
    "Side",
    "axes",
    "depthwise",
    "holds_units",
    "reads_units",
    "refresh",
    "why_not",
]

Side = Literal["in", "out"]
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
_GATES = {nn.RNN: 1, nn.LSTM: 4, nn.GRU: 3}
_NORMS = (_BatchNorm, _InstanceNorm)
_BASES = (nn.Linear, _ConvNd, _BatchNorm, _InstanceNorm, nn.PReLU, nn.Embedding, *RECURRENT)


class Axis(NamedTuple):
    """Dimension ``dim`` of the tensor ``name`` of a layer, with ``blocks`` copies of the units
    (gates) along it.
    """

    name: str
    dim: int
    blocks: int = 1


def depthwise(module: nn.Module) -> bool:
    """Whether this is a convolution in which each output channel has its own input channel."""
    if not isinstance(module, _ConvNd) or module.groups == 1:
        return False
    return bool(module.groups == module.in_channels == module.out_channels)


def why_not(module: nn.Module) -> str | None:
    """Why units at this layer cannot be cut, as the end of a sentence; None if they can."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        return "is parametrized: remove the parametrization first"
    if any(isinstance(child, SparseWeight) for child in module.children()):
        return f"is a sparse layer ({kind}), whose units are lists of connections: densify it first"
    if not isinstance(module, _BASES):
        return f"is a {kind}, from which units cannot be cut with the same outputs"
    plain = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))
    if type(module).forward is not plain.forward:  # type: ignore[attr-defined]
        return f"is a {kind} with a forward of its own"
    names = {axis.name for side in ("in", "out") for axis in axes(module, side)}
    if not isinstance(module, _NORMS) and not names <= module._parameters.keys():
        return (
            "has a weight that is computed from other tensors (weight_norm, spectral_norm, pruning "
            "masks)"
        )
    if isinstance(module, _ConvNd) and module.groups > 1 and not depthwise(module):
        return f"is a convolution with groups={module.groups}, whose groups must keep equal sizes"
    if isinstance(module, RECURRENT):
        if module.num_layers > 1 or module.bidirectional:
            return (
                "is a recurrent layer of several layers or directions, which share one hidden_size"
            )
        if module.proj_size:
            return "is an LSTM with proj_size, whose cells and outputs are different units"
    return None


def holds_units(module: nn.Module) -> bool:
    """Whether the layer has its own units: outputs that each depend on all inputs."""
    kinds = (nn.Linear, _ConvNd, nn.Embedding, *RECURRENT)
    return isinstance(module, kinds) and not depthwise(module)


def reads_units(module: nn.Module) -> bool:
    """Whether the layer mixes incoming units, with a column of its weight for each."""
    return holds_units(module) and not isinstance(module, nn.Embedding)


def axes(module: nn.Module, side: Side) -> Iterator[Axis]:
    """The tensors and dimensions of the units at one side of the layer.

    Both sides of a norm or a depthwise convolution are the same.
    """
    if isinstance(module, nn.Linear):
        names = ("weight", "bias") if side == "out" else ("weight",)
        yield from (Axis(name, 1 if side == "in" else 0) for name in names)
    elif isinstance(module, _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        if depthwise(module):
            yield from (Axis("weight", 0), Axis("bias", 0))
        elif side == "out":
            yield from (Axis("weight", 1 if transposed else 0), Axis("bias", 0))
        else:
            yield Axis("weight", 0 if transposed else 1)
    elif isinstance(module, nn.Embedding):
        if side == "out":
            yield Axis("weight", 1)
    elif isinstance(module, RECURRENT):
        if side == "in":
            yield Axis("weight_ih_l0", 1)
            return
        gates = next(n for base, n in _GATES.items() if isinstance(module, base))
        for name in ("weight", "bias") if module.bias else ("weight",):
            yield from (Axis(f"{name}_{part}_l0", 0, gates) for part in ("ih", "hh"))
        yield Axis("weight_hh_l0", 1)
    elif isinstance(module, nn.PReLU):
        if module.num_parameters > 1:
            yield Axis("weight", 0)
    elif isinstance(module, _NORMS):
        yield from (Axis(name, 0) for name in ("weight", "bias", "running_mean", "running_var"))


def refresh(module: nn.Module) -> None:
    """Set the attributes that count units to the shapes of the tensors."""
    own: dict[str, Any] = {**module._parameters, **module._buffers}
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = own["weight"].shape
    elif isinstance(module, _ConvNd):
        if depthwise(module):
            module.groups = module.in_channels = module.out_channels = own["weight"].shape[0]
        elif module.groups == 1:
            first, second = own["weight"].shape[:2]
            transposed = isinstance(module, _ConvTransposeNd)
            module.in_channels, module.out_channels = (
                (first, second) if transposed else (second, first)
            )
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = own["weight"].shape[1]
    elif isinstance(module, RECURRENT):
        module.input_size = own["weight_ih_l0"].shape[1]
        module.hidden_size = own["weight_hh_l0"].shape[1]
        module.flatten_parameters()
    elif isinstance(module, nn.PReLU):
        module.num_parameters = own["weight"].numel()
    elif isinstance(module, _NORMS):
        counted = own["running_mean"] if own.get("running_mean") is not None else own.get("weight")
        if counted is not None:
            module.num_features = counted.numel()

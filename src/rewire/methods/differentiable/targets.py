"""What differentiable sparsification can switch off: units, single weights, attention heads,
branches.

A target puts its gate into the model (a submodule, so that ``state_dict`` has it), says which
components are on, bakes the gate into the weights at the end, and takes out what is zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from rewire.methods.differentiable.gates import Elementwise, Gate
from rewire.nn.structure import Part, announce
from rewire.nn.surgery import UnitGraph

__all__ = [
    "CONSTANT",
    "GATE",
    "WITH_UNITS",
    "Columns",
    "Cutting",
    "Target",
    "bake_parametrization",
    "fitting",
    "last_affine",
    "make_gate",
    "parametrization",
    "place_of",
    "scale_affine",
    "take_off",
    "weight_of",
]

#: The name under which a gate is a submodule of what it gates.
GATE = "rewire_gate"
#: Largest difference within an input that counts as constant, of dead units after baking.
CONSTANT = 1e-6
WITH_UNITS = (nn.Linear, _ConvNd, _BatchNorm)


class Cutting:
    """What targets share when they are cut: the units of the network, found when the first asks;
    what was refused.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example = model, example
        #: Layer -> why its units stay, with weights of 0.
        self.refused: dict[str, str] = {}
        self._graph: UnitGraph | str | None = None

    def graph(self, name: str) -> UnitGraph | None:
        """The units of the network as it is now; None, noted for layer ``name``, where they cannot
        be found.
        """
        if self._graph is None:
            try:
                self._graph = UnitGraph(self.model, self.example)
            except ValueError as error:
                self._graph = str(error)
        if isinstance(self._graph, str):
            self.refused[name] = self._graph
            return None
        return self._graph


class Target(ABC):
    """Components that share a gate.

    Attributes:
        name: of the layer, or "branches".
        count: number of components.
        order: targets are cut in ascending order: whole branches first, so that nothing is done to
            what is gone.
    """

    name: str
    count: int
    order: int
    gate: nn.Module

    def parameters(self) -> list[nn.Parameter]:
        """Gates and thresholds, which join the optimizer."""
        return list(self.gate.parameters())

    def values(self) -> Tensor:
        """The a_i that the penalty is taken of; 0 exactly where a component is off. With
        gradient.
        """
        a: Tensor = self.gate()
        return a

    @abstractmethod
    def bake(self) -> None:
        """Multiply the gate into the weights and take it off; the function stays the same."""

    @abstractmethod
    def cut(self, optimizers: Sequence[Optimizer], cutting: Cutting) -> None:
        """Take out what is zero; the function stays the same."""


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer, as its forward pass sees it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def place_of(model: nn.Module, module: nn.Module) -> str | None:
    """The name of a module in the model; None if it is not in it any more."""
    return next((name for name, there in model.named_modules() if there is module), None)


_G = TypeVar("_G", bound=nn.Module)


def make_gate(
    owner: nn.Module,
    name: str,
    count: int,
    kind: Any,
    options: Mapping[str, Any],
    made: type[Gate] = Gate,
) -> Gate:
    """The gate of ``owner``: a new one, or what a copied model has there from the method of its
    original.
    """
    there = owner._modules.get(GATE)
    if isinstance(there, Gate):
        return fitting(there, name, (kind, count), (there.kind, there.count))
    gate = made(count, kind, **options)
    owner.add_module(GATE, gate)
    return gate


def fitting(gate: _G, name: str, wanted: object, has: object) -> _G:
    if wanted != has:
        raise ValueError(
            f"{name} has a gate of {has} from another Differentiable, and this one wants {wanted}: "
            "give the same settings, or copy the model before the other method is made"
        )
    return gate


def parametrization(module: nn.Module) -> nn.Module | None:
    """What alone computes the weight of ``module``, if it is a gate of ours."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    found = list(module.parametrizations["weight"])  # type: ignore[index]
    return found[0] if len(found) == 1 and isinstance(found[0], Elementwise | Columns) else None


def bake_parametrization(module: nn.Module) -> None:
    """Leave the weight that is computed now as an ordinary parameter."""
    # Copies share the class that torch has made for the parametrized module, and it is about to
    # lose its weight.
    kind = type(module)
    members = {k: v for k, v in kind.__dict__.items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, members)
    gates = list(module.parametrizations["weight"])  # type: ignore[index]
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    weight = module._parameters["weight"]
    assert weight is not None
    # an average of the weight goes through the same gate
    announce(weight, [Part(weight, gates[0])])


def take_off(module: nn.Module, function: Any) -> None:
    """Remove the hook that applied a gate for another method (also in copies, which have it
    too).
    """
    for number, hook in list(module._forward_hooks.items()):
        if isinstance(hook, partial) and hook.func is function:
            del module._forward_hooks[number]


class Columns(nn.Module):
    """Parametrization of an attention's output projection: one factor for the columns of each
    head.
    """

    def __init__(self, gate: Gate, width: int) -> None:
        super().__init__()
        self.gate, self.width = gate, width

    def forward(self, weight: Tensor) -> Tensor:
        factors: Tensor = self.gate()
        return weight * factors.repeat_interleave(self.width)


def scale_affine(module: nn.Module, a: Tensor) -> None:
    """Multiply the outputs (dimension 0 of weight and bias) of a layer by ``a`` (n or scalar)."""
    for tensor in (module._parameters["weight"], module._parameters.get("bias")):
        if tensor is not None:
            factor = (a if a.dim() == 0 else a.view(-1, *[1] * (tensor.dim() - 1))).detach()
            tensor.mul_(factor)
            announce(tensor, [Part(tensor, factor.mul)])


def last_affine(module: nn.Module) -> nn.Module | None:
    """The layer that makes the module's output, if its weight and bias scale that output."""
    while type(module) is nn.Sequential and len(module):
        module = module[-1]
    fits = isinstance(module, WITH_UNITS) and not isinstance(module, _ConvTransposeNd)
    return module if fits and module._parameters.get("weight") is not None else None

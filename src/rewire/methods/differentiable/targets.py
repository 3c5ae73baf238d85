"""What differentiable sparsification can switch off: units, single weights, attention heads,
branches.

A target puts its gate into the model (a submodule, so that ``state_dict`` has it), says which
components are on, bakes the gate into the weights at the end, and takes out what is zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from rewire.methods.differentiable.gates import Elementwise, Gate
from rewire.nn.convert.cut import to_sparse
from rewire.nn.convert.replacing import ties
from rewire.nn.forward.modes import evaluating, rehearsing
from rewire.nn.forward.tensors import first_input, first_tensor
from rewire.nn.layers.absent import Absent
from rewire.nn.structure import Part, announce
from rewire.nn.surgery import Group, UnitGraph, fold, takes_constants
from rewire.nn.surgery.sides import holds_units
from rewire.nn.surgery.trace import call

__all__ = ["Branches", "Cutting", "Heads", "Target", "Units", "Weights", "chosen", "group_of"]

#: The name under which a gate is a submodule of what it gates.
GATE = "rewire_gate"
#: Largest difference within an input that counts as constant, of dead units after baking.
CONSTANT = 1e-6


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

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Gates and thresholds, which join the optimizer."""

    @abstractmethod
    def values(self) -> Tensor:
        """The a_i that the penalty is taken of; 0 exactly where a component is off. With
        gradient.
        """

    @abstractmethod
    def bake(self) -> None:
        """Multiply the gate into the weights and take it off; the function stays the same."""

    @abstractmethod
    def cut(self, optimizers: Sequence[Optimizer], cutting: Cutting) -> None:
        """Take out what is zero; the function stays the same."""


_G = TypeVar("_G", bound=nn.Module)


def _gate(owner: nn.Module, name: str, count: int, kind: Any, options: Mapping[str, Any]) -> Gate:
    """The gate of ``owner``: a new one, or what a copied model has there from the method of its
    original.
    """
    there = owner._modules.get(GATE)
    if isinstance(there, Gate):
        return _fitting(there, name, (kind, count), (there.kind, there.count))
    gate = Gate(count, kind, **options)
    owner.add_module(GATE, gate)
    return gate


def _fitting(gate: _G, name: str, wanted: object, has: object) -> _G:
    if wanted != has:
        raise ValueError(
            f"{name} has a gate of {has} from another Differentiable, and this one wants "
            f"{wanted}: give the same "
            "settings, or copy the model before the other method is made"
        )
    return gate


def _parametrization(module: nn.Module) -> nn.Module | None:
    """What alone computes the weight of ``module``, if it is a gate of ours."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    found = list(module.parametrizations["weight"])  # type: ignore[index]
    return found[0] if len(found) == 1 and isinstance(found[0], Elementwise | _Columns) else None


def _bake(module: nn.Module) -> None:
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


def _take_off(module: nn.Module, function: Any) -> None:
    """Remove the hook that applied a gate for another method (also in copies, which have it
    too).
    """
    for number, hook in list(module._forward_hooks.items()):
        if isinstance(hook, partial) and hook.func is function:
            del module._forward_hooks[number]


class Units(Target):
    """Output units of a Linear, Conv or BatchNorm layer."""

    order = 2

    def __init__(self, model: nn.Module, name: str, kind: Any, options: Mapping[str, Any]) -> None:
        self.model, self.name = model, name
        self.module = model.get_submodule(name)
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        self.count = weight.shape[0]
        like = {"device": weight.device, "dtype": weight.dtype}
        self.gate = _gate(
            self.module, name, self.count, kind, {**options, **like, "keep_one": True}
        )
        _take_off(self.module, _gate_output)
        dim = -1 if isinstance(self.module, nn.Linear) else 1
        self._handle = self.module.register_forward_hook(partial(_gate_output, self.gate, dim))

    def parameters(self) -> list[nn.Parameter]:
        return list(self.gate.parameters())

    def values(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        a: Tensor = self.gate(weight)
        if self.gate.kind == "group":  # the norm of the gated row is what shrinks, not the factor
            a = a * torch.linalg.vector_norm(weight.flatten(1), dim=1)
        return a

    def bake(self) -> None:
        a = self.gate(self.module.weight)
        self._handle.remove()
        delattr(self.module, GATE)
        self.dead = (a == 0).nonzero().flatten()
        _scale(self.module, a)

    def cut(self, optimizers: Sequence[Optimizer], cutting: Cutting) -> None:
        """Units that are 0 on every way to their consumers go; the constants that their successors
        see are folded.
        """
        if not self.dead.numel() or self.module not in list(self.model.modules()):
            return
        graph = cutting.graph(self.name)
        if graph is None:
            return
        group = group_of(graph, self.name)
        if isinstance(group, str):
            cutting.refused[self.name] = group
            return
        silent = [
            u
            for u in group.alive.tolist()
            if all(_silent(graph, site, u) for site in group.producers)
        ]
        constants = _constants(self.model, cutting.example, graph, group, silent)
        gone = [
            u
            for u in silent
            if u in constants and (not constants[u] or takes_constants(graph, group))
        ]
        gone = gone[: group.alive.numel() - 1]
        for u in gone:
            for site in group.consumers:
                fold(graph, group, site, torch.tensor(u), constant=constants[u])
        if gone:
            places = torch.searchsorted(group.alive, torch.tensor(gone))
            graph.remove({group.name: places}, list(optimizers))


def _gate_output(gate: Gate, dim: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    a: Tensor = gate(module.weight)
    return output * (a if dim == -1 else a.view(-1, *[1] * (output.dim() - 2)))


def _scale(module: nn.Module, a: Tensor) -> None:
    """Multiply the outputs (dimension 0 of weight and bias) of a layer by ``a`` (n or scalar)."""
    for tensor in (module._parameters["weight"], module._parameters.get("bias")):
        if tensor is not None:
            factor = (a if a.dim() == 0 else a.view(-1, *[1] * (tensor.dim() - 1))).detach()
            tensor.mul_(factor)
            announce(tensor, [Part(tensor, factor.mul)])


def group_of(graph: UnitGraph, name: str) -> Group | str:
    """The group whose producers or followers include layer ``name``; the reason where its units
    cannot be cut.
    """
    if holds_units(graph.model.get_submodule(name)):
        reason = graph.refusal(name)
        return graph.group(name) if reason is None else reason
    refused = []
    for producer in graph.names:
        reason = graph.refusal(producer)
        if reason is not None:
            refused.append(reason)
            continue
        group = graph.group(producer)
        if any(site.name == name for site in (*group.producers, *group.followers)):
            return group
    return (
        "no layer whose units can be cut goes through "
        f"{name}: "
        f"{'; '.join(refused) or 'it was not called'}"
    )


def _silent(graph: UnitGraph, site: Any, unit: int) -> bool:
    """Whether the unit leaves the producer, or the BatchNorm directly behind it, as a constant."""
    place = graph.positions(site, torch.tensor([unit])).flatten()
    norm = graph.norm_after(site.name)
    for module in (site.module, norm):
        if module is None or isinstance(module, _ConvTransposeNd) or not isinstance(module, _KINDS):
            continue
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        if weight is None or weight[place].any():
            continue
        if module is site.module or bias is None or not bias[place].any():
            return True
    return False


@torch.no_grad()
def _constants(
    model: nn.Module, example: Any, graph: UnitGraph, group: Group, units: Sequence[int]
) -> dict[int, float]:
    """What each unit gives its consumers, for those units that give all of them the same
    constant.
    """
    if not units:
        return {}
    seen: dict[str, list[Tensor]] = {site.name: [] for site in group.consumers}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(first_input(module, args, kwargs))
        if x is not None:
            seen[name].append(x)

    handles = [
        site.module.register_forward_pre_hook(partial(note, site.name), with_kwargs=True)
        for site in group.consumers
    ]
    try:
        with evaluating(model):
            call(model, example)
        if not all(seen.values()):  # read in training mode alone
            with rehearsing(model, train=True):
                call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    given = []
    for site in group.consumers:
        for x in seen[site.name]:
            dim = (
                x.dim() - len(site.module.kernel_size) - 1
                if isinstance(site.module, _ConvNd)
                else x.dim() - 1
            )
            # (units, places)
            places = graph.positions(site, torch.tensor(units, dtype=torch.int64)).to(x.device)
            given.append(x.movedim(dim, 0)[places].reshape(len(units), -1))
    values = torch.cat(given, 1) if given else torch.zeros(len(units), 1)
    first = values[:, :1]
    same = ((values - first).abs() <= CONSTANT * first.abs().clamp(min=1)).all(1).tolist()
    return {
        unit: value
        for unit, value, is_same in zip(units, first.flatten().tolist(), same, strict=True)
        if is_same
    }


class Weights(Target):
    """Single weights of one layer, under a parametrization."""

    order = 3

    def __init__(self, model: nn.Module, name: str, kind: Any, options: Mapping[str, Any]) -> None:
        self.model, self.name = model, name
        self.module = model.get_submodule(name)
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        self.count = weight.numel()
        there = _parametrization(self.module)
        if isinstance(there, Elementwise):
            self.gate = _fitting(there, name, kind, there.kind)
        else:
            self.gate = Elementwise(weight, kind, **options)
            parametrize.register_parametrization(self.module, "weight", self.gate)

    def parameters(self) -> list[nn.Parameter]:
        return [self.gate.beta]

    def values(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def bake(self) -> None:
        _bake(self.module)

    def cut(self, optimizers: Sequence[Optimizer], cutting: Cutting) -> None:
        there = next(
            (name for name, module in self.model.named_modules() if module is self.module), None
        )
        if there is not None:  # not in a branch that is gone
            weight = self.module.weight
            assert isinstance(weight, Tensor)
            to_sparse(self.model, {f"{there}.weight": weight != 0}, optimizers)


class _Columns(nn.Module):
    """Parametrization of an attention's output projection: one factor for the columns of each
    head.
    """

    def __init__(self, gate: Gate, width: int) -> None:
        super().__init__()
        self.gate, self.width = gate, width

    def forward(self, weight: Tensor) -> Tensor:
        factors: Tensor = self.gate()
        return weight * factors.repeat_interleave(self.width)


class Heads(Target):
    """Heads of a `torch.nn.MultiheadAttention`."""

    order = 4

    def __init__(self, model: nn.Module, name: str, kind: Any, options: Mapping[str, Any]) -> None:
        self.model, self.name = model, name
        module = model.get_submodule(name)
        assert isinstance(module, nn.MultiheadAttention)
        self.module, self.count = module, module.num_heads
        weight = module.out_proj.weight
        there = _parametrization(module.out_proj)
        if isinstance(there, _Columns):
            self.gate = _fitting(there.gate, name, kind, there.gate.kind)
        else:
            self.gate = Gate(
                self.count, kind, keep_one=True, device=weight.device, dtype=weight.dtype, **options
            )
            parametrize.register_parametrization(
                module.out_proj, "weight", _Columns(self.gate, module.head_dim)
            )

    def parameters(self) -> list[nn.Parameter]:
        return list(self.gate.parameters())

    def values(self) -> Tensor:
        a: Tensor = self.gate()
        return a

    def bake(self) -> None:
        self.alive = self.gate() != 0
        _bake(self.module.out_proj)

    def cut(self, optimizers: Sequence[Optimizer], cutting: Cutting) -> None:
        there = next(
            (name for name, module in self.model.named_modules() if module is self.module), None
        )
        if there is None or bool(self.alive.all()):
            return
        rows = self.alive.repeat_interleave(self.module.head_dim)
        embed, dims = (
            self.module.embed_dim,
            (self.module.embed_dim, self.module.kdim, self.module.vdim),
        )
        masks = {
            f"{there}.{letter}_proj_weight": rows.unsqueeze(1).expand(embed, int(width or embed))
            for letter, width in zip("qkv", dims, strict=True)
        }
        masks[f"{there}.out_proj.weight"] = rows.unsqueeze(0).expand(embed, embed)
        to_sparse(self.model, masks, optimizers)


class Branches(Target):
    """Whole modules, whose outputs are multiplied by the entries of one gate."""

    name = "branches"
    order = 1

    def __init__(
        self, model: nn.Module, names: Sequence[str], kind: Any, options: Mapping[str, Any]
    ) -> None:
        self.model, self.names, self.count = model, list(names), len(names)
        self.modules = [model.get_submodule(name) for name in names]
        like = next(self.modules[0].parameters())
        options = {**options, "device": like.device, "dtype": like.dtype}
        self.gate = _gate(model, self.name, self.count, kind, options)
        for module in self.modules:
            _take_off(module, _gate_branch)
        self._handles = [
            module.register_forward_hook(partial(_gate_branch, self.gate, i))
            for i, module in enumerate(self.modules)
        ]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.gate.parameters())

    def values(self) -> Tensor:
        a: Tensor = self.gate()
        return a

    def bake(self) -> None:
        self.a = self.gate()
        for handle in self._handles:
            handle.remove()
        delattr(self.model, GATE)
        for module, a in zip(self.modules, self.a, strict=True):
            last = _last_affine(module)
            assert last is not None  # `chosen` looked
            _scale(last, a)

    def cut(self, optimizers: Sequence[Optimizer], cutting: Cutting) -> None:
        for name, a in zip(self.names, self.a.tolist(), strict=True):
            if a == 0:
                parent, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, Absent())
        left = {id(parameter) for parameter in self.model.parameters()}
        lost = [p for module in self.modules for p in module.parameters() if id(p) not in left]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"][:] = [p for p in group["params"] if all(p is not x for x in lost)]
            for parameter in lost:
                optimizer.state.pop(parameter, None)


def _gate_branch(gate: Gate, number: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    a: Tensor = gate()
    return output * a[number]


# --- choosing -------------------------------------------------------------------------------------

_KINDS = (nn.Linear, _ConvNd, _BatchNorm)


def _last_affine(module: nn.Module) -> nn.Module | None:
    """The layer that makes the module's output, if its weight and bias scale that output."""
    while type(module) is nn.Sequential and len(module):
        module = module[-1]
    fits = isinstance(module, _KINDS) and not isinstance(module, _ConvTransposeNd)
    return module if fits and module._parameters.get("weight") is not None else None


def chosen(
    model: nn.Module, names: Mapping[str, Sequence[str] | None], gate: str
) -> dict[str, list[str]]:
    """The layers that the patterns of each target choose, checked; ValueError says which do not
    fit.
    """
    modules = dict(model.named_modules())
    tied = ties(model)

    def unfit(kind: str, name: str) -> str | None:
        return _fits(kind, modules[name], gate, tied)

    if all(patterns is None for patterns in names.values()):
        linear = [name for name, module in modules.items() if type(module) is nn.Linear][:-1]
        units = [name for name in linear if unfit("units", name) is None]
        if not units:
            looked = ", ".join(f"{n} {unfit('units', n)}" for n in linear) or "there is none"
            raise ValueError(
                "the model has no Linear layer but the last whose units could be gated "
                f"({looked}): say what to gate, "
                "with units=, weights=, heads= or branches="
            )
        return {"units": units, "weights": [], "heads": [], "branches": []}
    found: dict[str, list[str]] = {}
    for kind, patterns in names.items():
        found[kind] = []
        for pattern in patterns or ():
            matches = [name for name in modules if name and fnmatchcase(name, pattern)]
            if kind == "branches":  # "bodies.*" means the bodies, not also the layers in them
                matches = [
                    name
                    for name in matches
                    if not any(name.startswith(f"{other}.") for other in matches)
                ]
            else:
                fitting = [name for name in matches if unfit(kind, name) is None]
                if matches and not fitting:
                    raise ValueError(f"{kind}={pattern!r}: {matches[0]} {unfit(kind, matches[0])}")
                matches = fitting if any(c in pattern for c in "*?[") else matches
            if not matches:
                raise ValueError(f"{kind}={pattern!r} matches no module of the model")
            found[kind] += [name for name in matches if name not in found[kind]]
        for name in found[kind]:
            if (reason := unfit(kind, name)) is not None:
                raise ValueError(f"{kind}: {name} {reason}")
    twice = set(found["units"]) & set(found["weights"])
    if twice:
        raise ValueError(
            f"{', '.join(sorted(twice))} would have gates on units and on weights: choose one"
        )
    nested = [(a, b) for a in found["branches"] for b in found["branches"] if b.startswith(a + ".")]
    if nested:
        raise ValueError(f"branches: {nested[0][1]} lies within {nested[0][0]}: choose one of them")
    return found


def _fits(
    kind: str, module: nn.Module, gate: str, tied: Mapping[int, tuple[str, str]]
) -> str | None:
    """Why the module cannot be such a target; None if it can. ``tied``: see
    `rewire.nn.convert.replacing.ties`.
    """
    if parametrize.is_parametrized(module) and not (kind == "weights" and _parametrization(module)):
        return "is parametrized already"
    own = type(module) if not parametrize.is_parametrized(module) else type(module).__bases__[0]
    scaled = module if kind != "branches" else _last_affine(module) or module
    for part in scaled.modules():
        if id(part) in tied:  # baking the gate into one layer would scale the other as well
            return f"shares its {tied[id(part)][1]}: untie them first, or leave it out"
    what = own.__name__
    if kind == "heads":
        return (
            None
            if type(module) is nn.MultiheadAttention
            else (f"is a {what}, and only MultiheadAttention has heads")
        )
    if kind == "branches":
        if _last_affine(module) is not None:
            return None
        return (
            f"({what}) does not end in a Linear, Conv or BatchNorm layer with weights, "
            "which "
            "could take its factor"
        )
    allowed = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if kind == "units" and gate != "group" and isinstance(module, _BatchNorm):
        return None if module.affine else "has no affine parameters to take the gate (affine=False)"
    if own in allowed:
        return None
    more = "" if kind == "weights" or gate == "group" else ", BatchNorm"
    return f"is a {what}: allowed are Linear, Conv1d, Conv2d, Conv3d{more}"

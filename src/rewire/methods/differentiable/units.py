"""Units, neurons and channels, as what differentiable sparsification can switch off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

from rewire.methods.differentiable.gates import Gate
from rewire.methods.differentiable.targets import (
    CONSTANT,
    GATE,
    WITH_UNITS,
    Cutting,
    Target,
    make_gate,
    scale_affine,
    take_off,
    weight_of,
)
from rewire.nn.forward.modes import evaluating, rehearsing
from rewire.nn.forward.tensors import first_input, first_tensor
from rewire.nn.surgery import Group, UnitGraph, fold, takes_constants
from rewire.nn.surgery.sides import holds_units
from rewire.nn.surgery.trace import call

__all__ = ["Units", "group_of"]


class Units(Target):
    """Output units of a Linear, Conv or BatchNorm layer."""

    order = 2

    def __init__(self, model: nn.Module, name: str, kind: Any, options: Mapping[str, Any]) -> None:
        self.model, self.name = model, name
        self.module = model.get_submodule(name)
        weight = weight_of(self.module)
        self.count = weight.shape[0]
        like = {"device": weight.device, "dtype": weight.dtype}
        self.gate = make_gate(
            self.module, name, self.count, kind, {**options, **like, "keep_one": True}
        )
        take_off(self.module, _gate_output)
        dim = -1 if isinstance(self.module, nn.Linear) else 1
        self._handle = self.module.register_forward_hook(partial(_gate_output, self.gate, dim))

    def values(self) -> Tensor:
        weight = weight_of(self.module)
        a: Tensor = self.gate(weight)
        if self.gate.kind == "group":  # the norm of the gated row is what shrinks, not the factor
            a = a * torch.linalg.vector_norm(weight.flatten(1), dim=1)
        return a

    def bake(self) -> None:
        a = self.gate(self.module.weight)
        self._handle.remove()
        delattr(self.module, GATE)
        self.dead = (a == 0).nonzero().flatten()
        scale_affine(self.module, a)

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
        f"no layer whose units can be cut goes through {name}: "
        f"{'; '.join(refused) or 'it was not called'}"
    )


def _silent(graph: UnitGraph, site: Any, unit: int) -> bool:
    """Whether the unit leaves the producer, or the BatchNorm directly behind it, as a constant."""
    place = graph.positions(site, torch.tensor([unit])).flatten()
    norm = graph.norm_after(site.name)
    for module in (site.module, norm):
        if (
            module is None
            or isinstance(module, _ConvTransposeNd)
            or not isinstance(module, WITH_UNITS)
        ):
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

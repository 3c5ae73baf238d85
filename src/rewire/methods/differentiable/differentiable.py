"""Differentiable sparsification: gates and thresholds trained with the network switch components
off exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer

from rewire.methods.core.base import Data, Method
from rewire.methods.core.layer_hooks import LayerHook
from rewire.methods.core.parameters import NonNegative, Patterns, data_field, parameter, setting
from rewire.methods.core.registry import register
from rewire.methods.differentiable.choice import chosen
from rewire.methods.differentiable.components import Branches, Heads, Weights
from rewire.methods.differentiable.gates import GateKind, Recover, p_norm
from rewire.methods.differentiable.targets import GATE, Cutting, Target
from rewire.methods.differentiable.units import Units, group_of
from rewire.nn.forward.tensors import head
from rewire.nn.optimizers.wrappers import listed
from rewire.nn.surgery import UnitGraph
from rewire.nn.surgery.trace import Arguments, torch_pruning
from rewire.schedules import Schedule

__all__ = ["Differentiable"]


@register(
    name="differentiable",
    paper="Lee, 2019 (arXiv 1910.03201); formulas partly from memory, see docs/differentiable.md",
    summary="gates or thresholds, trained with the weights, make units, heads, branches or "
    "weights exactly zero",
    keeps_budget="no",
    memory="O(M)",
    guarantees=(
        "exact zeros during training, by gradient descent alone",
        "fewer than 1 / sigma(beta) components stay on",
        "the final network gives the same outputs, without what is off",
    ),
)
class Differentiable(Method):
    """Minimise ``loss + strength R(a)`` over weights, gates and thresholds, all by the model's own
    optimizer::

        a_i = sign(alpha_i) (|alpha_i| - sigma(beta) ||alpha||_1)_+      gate="non-competitive"
        a = softmax with a threshold, sums to 1                           gate="competitive"
        a_g = (||w_g|| - sigma(beta) sum_h ||w_h||)_+ / ||w_g||   gate="group": no alpha
        R(a) = (sum |a_i|^p)^(1/p)

    A component's output is multiplied by its a_i; `rewire.methods.differentiable.gates` has the
    formulas. `penalty` is the second term. `finalize` multiplies the gates into the weights and
    takes out what is zero: units physically (with the optimizer's state, by `rewire.nn.surgery`),
    branches by `rewire.nn.Absent`, weights and heads by sparse layers (`to_sparse`).

    The outputs (neurons, channels) of ``units`` get gates; not those of the output layer. With
    BatchNorm the gate belongs behind it, because BatchNorm undoes a scaling before it. Each of
    ``branches`` is one component (a residual branch, an edge, a layer): its output gets one gate of
    a common vector, and where it is switched off it ends as `rewire.nn.Absent`, which returns 0.

    The first two rows of the first batch of ``data`` are the example that the network is traced
    with. Layers whose units cannot be cut are then left alone (``stats()["refused"]``); named
    without wildcards they are an error. Without ``data`` the example is of the first forward pass,
    and `finalize` finds out what can be cut.

    Raises ValueError for patterns that match nothing or layers of other types, and where the
    optimizer has weight decay in all its parameter groups: decay would pull beta to 0, where
    everything is cut. Cost: one more multiplication per gated output, O(weights) for thresholds of
    single weights.
    """

    units: Patterns | None = setting(
        default=None,
        help="names of Linear, Conv and BatchNorm layers whose outputs get gates; by default, if "
        "no target is given, all Linear layers but the last",
    )
    weights: Patterns | None = setting(
        default=None,
        help="names of layers whose single weights get thresholds; they end as sparse layers",
    )
    heads: Patterns | None = setting(
        default=None, help="names of `torch.nn.MultiheadAttention` layers, whose heads get gates"
    )
    branches: Patterns | None = setting(
        default=None, help="names of modules, each of which gets one gate"
    )
    gate: GateKind = setting(
        default="non-competitive",
        help='parameterisation of units, heads and branches ("group" is for units alone)',
    )
    weight_gate: Literal["non-competitive", "exclusive"] = setting(
        default="non-competitive", help="one threshold per layer, or one per output (no row dies)"
    )
    strength: NonNegative | Schedule = parameter(
        default=1e-4, help="lambda; a schedule is over steps"
    )
    p: float = setting(
        default=0.5,
        above=0,
        high=2,
        help='exponent of R; below 1 if gate="competitive", where ||a||_1 is 1',
    )
    normalise: bool = setting(
        default=False,
        help="R of a / ||a||_1, so that shrinking all gates while growing weights does not pay; "
        "needs p < 1",
    )
    initial: float = setting(
        default=0.01,
        above=0,
        below=1,
        help="c: thresholds start at beta = logit(c / n), so that everything is on and the "
        "function unchanged",
    )
    recover: Recover = setting(
        default="elu", help='what is off learns by the derivative of ELU, or not at all ("none")'
    )
    data: Data | None = data_field()

    acts_in_ranks = False
    starts_dense = True
    run_lr = 0.002  # small steps of one length for gates and weights

    def _check(self) -> None:
        if self.p >= 1 and (self.gate == "competitive" or self.normalise):
            raise ValueError(
                f"p must be below 1 where gates sum to 1 (competitive or normalise), not {self.p}"
            )
        if self.gate == "group" and (self.heads or self.branches):
            raise ValueError(
                "gate='group' is for units: choose 'non-competitive' or 'competitive' for heads, "
                "branches"
            )
        names = {kind: getattr(self, kind) for kind in ("units", "weights", "heads", "branches")}
        lists = {
            kind: None if given is None else [given] if isinstance(given, str) else list(given)
            for kind, given in names.items()
        }
        self._found = chosen(self.model, lists, self.gate)
        self._example: Any = None if self.data is None else head(_first(self.data), 2)
        self._refused: dict[str, str] = {}
        if self._found["units"]:
            torch_pruning()  # that it is missing is better said now than after training
            # it has gates already
            copied = any(name.split(".")[-1] == GATE for name, _ in self.model.named_modules())
            if self._example is not None and not copied:
                patterns = lists["units"] or ["*"]
                self._refused = _refuse(self.model, self._example, self._found, patterns)
        self._group = _home(self.optimizer, self.model)

    def _setup(self) -> None:
        model, found, options = (
            self.model,
            self._found,
            {"initial": self.initial, "recover": self.recover},
        )
        self.targets: list[Target] = [
            Units(model, name, self.gate, options) for name in found["units"]
        ]
        self.targets += [
            Weights(model, name, self.weight_gate, options) for name in found["weights"]
        ]
        self.targets += [Heads(model, name, self.gate, options) for name in found["heads"]]
        if found["branches"]:
            self.targets.append(Branches(model, found["branches"], self.gate, options))
        self._parameters = [p for target in self.targets for p in target.parameters()]
        self._take_in()
        self._handle: Any = None
        if self.data is None:
            self._handle = model.register_forward_pre_hook(_Look(self).before, with_kwargs=True)
            self._attachment.hold(self._handle)

    def _take_in(self) -> None:
        """Let the gates be trained in their group, and nowhere else (the optimizer of a copied
        model has them).
        """
        ours = {id(parameter) for parameter in self._parameters}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"][:] = [p for p in group["params"] if id(p) not in ours]
        self._group["params"].extend(self._parameters)

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a few rows of the first batch, to trace the network with."""
        few = head((*args, *kwargs.values()), 2)
        named = dict(zip(kwargs, few[len(args) :], strict=True))
        self._example = Arguments(few[: len(args)], named)
        if self._handle is not None:
            self._handle.remove()

    def penalty(self) -> Tensor:
        """``strength * sum over targets of R(a)``, a scalar with gradients to gates, thresholds
        and, for groups and single weights, the weights themselves.
        """
        total = super().penalty()
        for target in self.targets:
            a = target.values()
            if self.normalise:
                a = a / a.abs().sum().clamp(min=torch.finfo(a.dtype).tiny)
            total = total + p_norm(a, self.p)
        # A model that has made n steps is making step n + 1.
        return self._now("strength", self.steps) * total

    @torch.no_grad()
    def active_units(self) -> dict[str, Tensor]:
        """The units whose gate is not 0."""
        return {t.name: t.gate(t.module.weight) != 0 for t in self.targets if isinstance(t, Units)}

    def stats(self) -> dict[str, Any]:
        """As of every method; "components": how many of each target's are on, name -> (on, all);
        "refused": layers whose units cannot be cut -> why (known from the start where ``data`` was
        given, else after `finalize`).
        """
        with torch.no_grad():
            on = {t.name: (int((t.values() != 0).sum()), t.count) for t in self.targets}
        return super().stats() | {"components": on, "refused": dict(self._refused)}

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        """The network without gates and without what is off; the optimizer goes on with what is
        left.

        Raises RuntimeError if no forward pass was seen and no ``data`` given. Units that cannot be
        removed without a change of the output (a constant behind zero padding, say) stay, with
        weights of 0; so do those of a layer that cannot be cut at all (``stats()["refused"]`` says
        why).
        """
        if not self._attachment.attached:
            return self.model
        if self._example is None and any(isinstance(t, Units) for t in self.targets):
            raise RuntimeError(
                "finalize needs an example input: run the model once, or give data= at construction"
            )
        if self._handle is not None:
            self._handle.remove()
        self._forget_gates()
        for target in self.targets:
            target.bake()
        cutting = Cutting(self.model, self._example)
        for target in sorted(self.targets, key=lambda t: t.order):
            target.cut(self.optimizers, cutting)
        self._refused |= cutting.refused
        return super().finalize()

    def _forget_gates(self) -> None:
        ours = {id(parameter) for parameter in self._parameters}
        self._group["params"][:] = [p for p in self._group["params"] if id(p) not in ours]
        for optimizer in self.optimizers:
            for ours_too in self._parameters:
                optimizer.state.pop(ours_too, None)


class _Look(LayerHook):
    """Shows its method the first batch; in copies of the model it does nothing."""

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.method is not None:
            self.method._look(args, kwargs)


def _refuse(
    model: nn.Module, example: Any, found: dict[str, list[str]], patterns: Sequence[str]
) -> dict[str, str]:
    """Take layers whose units cannot be cut off ``found``, and say why; named without wildcards
    they are an error.
    """
    graph = UnitGraph(model, example)
    refused = {
        name: reason for name in found["units"] if isinstance(reason := group_of(graph, name), str)
    }
    for name, reason in refused.items():
        if name in patterns:
            raise ValueError(f"units: {reason}")
    if len(refused) == len(found["units"]):
        raise ValueError(
            f"units: no layer has units that can be cut: {'; '.join(refused.values())}"
        )
    found["units"] = [name for name in found["units"] if name not in refused]
    return refused


def _home(optimizers: Optimizer | Iterable[Optimizer], model: nn.Module) -> dict[str, Any]:
    """The parameter group the gates join: the first that trains the model without weight decay."""
    mine = {id(p) for p in model.parameters()}
    for optimizer in listed(optimizers):
        for group in optimizer.param_groups:
            if not group.get("weight_decay", 0) and any(id(p) in mine for p in group["params"]):
                return group
    raise ValueError(
        "every parameter group that trains the model has weight decay, which would pull the "
        "thresholds to where everything is cut: make the optimizer without, or with "
        "rewire.param_groups(model, weight_decay)"
    )


def _first(data: Data) -> Any:
    """The input of the first batch."""
    batch = next(iter(data))
    return (
        batch[0]
        if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence)
        else batch
    )

"""L1 shrinkage: proximal gradient descent, which makes weights exactly zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewire.methods.core.base import Evaluate, Pool
from rewire.methods.core.parameters import Epochs, NonNegative, parameter, setting
from rewire.methods.core.registry import register
from rewire.methods.core.runs import Run, suited_l1
from rewire.methods.pruning.shrink import Shrinking
from rewire.schedules import Schedule

__all__ = ["L1"]


@register(
    name="l1",
    paper="baseline of Bellec et al., ICLR 2018 (arXiv 1711.05136); ISTA: Daubechies et al. 2004",
    summary="train all connections with an L1 penalty, by proximal steps, and drop what ends "
    "at zero",
    keeps_budget="no",
    guarantees=(
        "weights are exactly zero, not just small",
        "the final budget is never exceeded by finalize's model",
    ),
)
class L1(Shrinking):
    """Iterated soft thresholding (ISTA): after each optimizer step of rate eta, on every
    connection::

        w <- sign(w) max(|w| - eta l1, 0)

    It is decoupled from the optimizer: not preconditioned, scaled or clipped. With plain SGD it
    minimises loss + l1 |w|_1, and a weight stays at zero while |dL/dw| <= l1. Weights at zero
    remain candidates, so the pool keeps its slots until the end (or for as long as ``every_epochs``
    says): finalize drops those with |w| <= zero, and, if there is a budget, the smallest beyond it.
    How many connections result is up to ``l1``: sweep it. `connections` says how many there are
    now.

    Cost: one pass over the connections there are, each step.
    """

    l1: NonNegative | Schedule = parameter(
        default=1e-3, help="the coefficient; a float or a schedule over steps"
    )
    zero: NonNegative = setting(
        default=0.0,
        help="magnitude up to which a weight counts as zero; at 0 finalize changes no prediction, "
        "because the proximal step makes exact zeros",
    )
    every_epochs: Epochs | None = setting(
        default=None,
        help="drop what is zero for good every so many epochs, which frees memory and time; None: "
        "at the end only",
    )

    budget_required = False

    @classmethod
    def run_options(cls, run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
        """A share of the rate where steps have about its length, whatever the gradient."""
        return suited_l1(run, given)

    def _check_start(self, final: Any) -> None:
        """Nothing: the budget is a bound, and shrinking may have gone below it before this was
        made.
        """

    def _after_step(self, pools: list[Pool]) -> None:
        for pool in pools:
            amount = pool.lr * self._now("l1", self.steps)
            values = pool.weight.values
            values.copy_(torch.sign(values) * (values.abs() - amount).clamp_(min=0.0))

    def _schedule(self) -> str | None:
        return None if self.every_epochs is None else f"every_epochs={self.every_epochs}"

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        if self.every_epochs is not None and self.epochs % self.every_epochs == 0:
            self._drop_zeros()

    def _drop_zeros(self) -> None:
        for pool in self._trained():
            slots = pool.may_go().long()
            zero = pool.weight.values.detach()[slots].abs() <= self.zero
            kept = slots.numel() < pool.weight.connections  # what is frozen
            if zero.all() and not kept:  # a layer without connections cannot be saved or trained
                zero[torch.argmax(pool.weight.values.detach()[slots].abs())] = False
            self._shrink(pool, slots[zero])
        self.updates += 1

    def count_connections(self) -> dict[str, int]:
        """Connections above ``zero`` or frozen, by weight: what finalize would leave (before a
        budget).
        """
        return {name: int(mask.sum()) for name, mask in self.active_masks().items()}

    def active_masks(self) -> dict[str, Tensor]:
        """Slots with a connection above ``zero``, or with a frozen one."""
        masks = {}
        for pool in self.pools:
            weight = pool.weight
            masks[pool.name] = (weight.rows >= 0) & (weight.values.detach().abs() > self.zero)
            slots = weight.active()
            masks[pool.name][slots[weight.is_frozen(slots)]] = True
        return masks

    def finalize(self) -> nn.Module:
        """Drop what is at most ``zero``, then what is above the budget, and return the model."""
        self._warn_of_no_update()
        if self._attachment.attached:
            with torch.no_grad():
                self._drop_zeros()
        return super().finalize()

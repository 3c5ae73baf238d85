"""L1 shrinkage: proximal gradient descent, which makes weights exactly zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.methods.core.base import Evaluate, Pool
from rewire.methods.core.registry import register
from rewire.methods.core.settings import choice
from rewire.methods.pruning.shrink import Connections, Density, Shrinking
from rewire.schedules import Schedule, at, checked, within

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
    memory="O(M)",
)
class L1(Shrinking):
    """Iterated soft thresholding (ISTA): after each optimizer step of rate eta, on every
    connection::

        w <- sign(w) max(|w| - eta l1, 0)

    It is decoupled from the optimizer: not preconditioned, scaled or clipped. With plain SGD it
    minimises loss + l1 |w|_1, and a weight stays at zero while |dL/dw| <= l1. Weights at zero
    remain candidates, so the pool keeps its slots until the end (``drop="end"``): finalize drops
    those with |w| <= threshold, and, if there is a budget, the smallest beyond it. How many
    connections result is up to ``l1``: sweep it. `connections` says how many there are now.

    Args:
        l1: the coefficient; a float or a schedule over steps.
        threshold: magnitude up to which finalize counts a weight as zero. At 0 (the default) it
            changes no prediction, because the proximal step makes exact zeros.
        drop: "end", or "epoch": what is at most ``threshold`` is dropped for good after every
            epoch, which frees memory and time, but never comes back.
        connections, density, distribution: optional; the most that finalize leaves, see
            `rewire.methods.pruning.shrink.final_budgets`.

    Cost: one pass over the connections there are, each step.
    """

    @classmethod
    def run_options(cls, epochs: int, given: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
        """A share of the rate where steps have about its length, whatever the gradient (as for DEEP
        R).
        """
        return (
            {"l1": 0.1} if optimizer in ("adam", "adamw", "rmsprop") and "l1" not in given else {}
        )

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        l1: float | Schedule = 1e-3,
        threshold: float = 0.0,
        drop: Literal["end", "epoch"] = "end",
        connections: Connections | None = None,
        density: Density | None = None,
        distribution: str = "erk",
        seed: int | None = None,
    ) -> None:
        choice("drop", drop, ("end", "epoch"))
        self.l1 = checked("l1", l1, 0.0)
        self.threshold, self.drop = within("threshold", threshold, 0.0), drop
        super().__init__(
            model,
            optimizer,
            connections=connections,
            density=density,
            distribution=distribution,
            required=False,
            seed=seed,
        )

    def _check_start(self, final: Any) -> None:
        """Nothing: the budget is a bound, and shrinking may have gone below it before this was
        made.
        """

    def _after_step(self, pools: list[Pool]) -> None:
        for pool in pools:
            amount = pool.lr * within("l1", at(self.l1, self.steps), 0.0)
            values = pool.weight.values
            values.copy_(torch.sign(values) * (values.abs() - amount).clamp_(min=0.0))

    def _schedule(self) -> str | None:
        return "drop='epoch': at the end of every epoch" if self.drop == "epoch" else None

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        if self.drop == "epoch":
            self._drop_zeros()

    def _drop_zeros(self) -> None:
        for pool in self._trained():
            slots = pool.weight.active()
            zero = pool.weight.values.detach()[slots].abs() <= self.threshold
            if zero.all():  # a layer without connections cannot be saved or trained
                zero[torch.argmax(pool.weight.values.detach()[slots].abs())] = False
            self._shrink(pool, slots[zero])
        self.updates += 1

    def connections(self) -> dict[str, int]:
        """Connections above the threshold, by weight: what finalize would leave (before a
        budget).
        """
        return {name: int(mask.sum()) for name, mask in self.active_masks().items()}

    def active_masks(self) -> dict[str, Tensor]:
        """Slots with a connection above the threshold."""
        return {
            pool.name: (pool.weight.rows >= 0)
            & (pool.weight.values.detach().abs() > self.threshold)
            for pool in self.pools
        }

    def finalize(self) -> nn.Module:
        """Drop what is at most the threshold, then what is above the budget, and return the
        model.
        """
        self._warn_of_no_update()
        if self._attachment.attached:
            with torch.no_grad():
                self._drop_zeros()
        return super().finalize()

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"threshold": self.threshold, "drop": self.drop}

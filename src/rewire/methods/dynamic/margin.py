"""The margin of MEST: how it falls, and a budget that may be exceeded by it between updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rewire.methods.core.base import Pool
from rewire.methods.core.parameters import setting
from rewire.methods.dynamic.rewirer import Rewiring

__all__ = ["EPOCHS", "MILESTONES", "Margin", "SoftlyBounded", "two_times"]

#: Epochs of the authors' 160 at which the margin is halved, and at which it becomes 0.
MILESTONES, EPOCHS = (90, 120), 160


def two_times(name: str, given: object) -> None:
    """Raise ValueError unless ``given`` is two epochs of at least 0."""
    several = tuple(given) if isinstance(given, Sequence) else ()
    if len(several) != 2 or not all(isinstance(m, int) and m >= 0 for m in several):
        raise ValueError(f"{name} must be two epochs of at least 0, not {given!r}")


@dataclass(frozen=True)
class Margin:
    """``start`` until ``milestones[0]`` (epochs), half of it until ``milestones[1]``, 0 from there
    on.
    """

    start: float
    milestones: tuple[int, int] = MILESTONES

    def __post_init__(self) -> None:
        two_times("milestones", self.milestones)

    def __call__(self, epoch: int) -> float:
        passed = sum(epoch >= m for m in self.milestones)
        return (self.start, self.start / 2, 0.0)[passed]


class SoftlyBounded(Rewiring):
    """A `Rewiring` that may have more than K connections between updates, by its share."""

    soft: bool = setting(
        default=False,
        help="EM&S, the soft memory bound; K is what the layers have when the method is made",
    )

    saves = ("_budgets",)

    def _setup(self) -> None:
        super()._setup()
        self._budgets = {pool.name: pool.weight.connections for pool in self.pools}

    def _exchange_all(self, pools: list[Pool], fraction: float, time: int) -> None:
        if not self.soft:
            super()._exchange_all(pools, fraction, time)
            return
        for pool in pools:
            self._to_budget(pool, fraction)

    def _to_budget(self, pool: Pool, fraction: float) -> None:
        """Drop to K, and grow the margin at random."""
        budget, now = self._budgets[pool.name], pool.weight.connections
        extra = min(int(fraction * budget), pool.weight.positions - budget)
        gone = max(now - budget, 0)
        free = pool.may_go().numel()
        slots = self.drop(pool, (gone + 0.5) / free) if gone else pool.weight.active()[:0]
        rows, cols = self.grow(pool, slots, extra, self.seed, self.epochs)
        self._exchange(pool, slots, rows, cols)

    def finalize(self) -> nn.Module:
        """As `Method.finalize`; with ``soft``, drops before what is above K, by magnitude."""
        if self.soft and self._attachment.attached:
            with torch.no_grad():
                for pool in self._trained():
                    slots = pool.may_go().long()
                    order = torch.sort(pool.weight.values[slots].abs(), stable=True).indices
                    above = pool.weight.connections - self._budgets[pool.name]
                    over = slots[order[: max(above, 0)]]
                    if over.numel():
                        self._exchange(pool, over, over[:0], over[:0])
        return super().finalize()

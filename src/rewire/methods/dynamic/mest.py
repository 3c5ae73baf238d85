"""MEST: memory-economic sparse training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rewire.methods.core.base import Pool
from rewire.methods.core.parameters import parameter
from rewire.methods.core.registry import register
from rewire.methods.core.updates import Timing, fill_in
from rewire.methods.criteria.drop import ByMagnitudeAndGradient
from rewire.methods.criteria.grow import Random
from rewire.methods.dynamic.rewirer import Rewiring
from rewire.schedules import Schedule

__all__ = ["MEST", "Margin"]

#: Epochs of the authors' 160 at which the margin is halved, and at which it becomes 0.
_MILESTONES, _EPOCHS = (90, 120), 160


def _two_times(name: str, given: object) -> None:
    several = tuple(given) if isinstance(given, Sequence) else ()
    if len(several) != 2 or not all(isinstance(m, int) and m >= 0 for m in several):
        raise ValueError(f"{name} must be two epochs of at least 0, not {given!r}")


@dataclass(frozen=True)
class Margin:
    """``start`` until ``milestones[0]`` (epochs), half of it until ``milestones[1]``, 0 from there
    on.
    """

    start: float
    milestones: tuple[int, int] = _MILESTONES

    def __post_init__(self) -> None:
        _two_times("milestones", self.milestones)

    def __call__(self, epoch: int) -> float:
        passed = sum(epoch >= m for m in self.milestones)
        return (self.start, self.start / 2, 0.0)[passed]


@register(
    name="mest",
    paper="Yuan et al., NeurIPS 2021 (arXiv 2110.14032)",
    summary="every 5 epochs, drop by magnitude plus gradient and grow at random (EM), or with a "
    "soft bound (EM&S)",
    keeps_budget="every step",
    guarantees=(
        "K exact in every layer at every moment (EM)",
        "never above K (1 + margin), and K at the end (EM&S)",
    ),
)
class MEST(Rewiring):
    """Every 5 epochs, in each layer, by the score |w| + gradient_weight |g| of the last step::

        EM     drop the floor(margin K) connections of lowest score, grow as many at random
        EM&S   drop all but the K of highest score, grow floor(margin K) at random:
               between updates K (1 + margin) exist

    New values are 0. Where the margin is 0, EM rests and EM&S returns to K for good; after
    ``until`` it does so in finalize.

    The score's form is recalled from the paper. Cost: O(K log K) per update.
    """

    margin: float | Schedule = parameter(
        default=0.2,
        low=0,
        high=1,
        help="a number that is halved and then 0 at the milestones, or a schedule of your own",
    )
    milestones: tuple[int, int] | None = parameter(
        default=None,
        check=_two_times,
        help="epochs of these two changes; by default the authors' 90 and 120 of 160 epochs, in a "
        "training of known length the same shares of it",
    )
    gradient_weight: float = parameter(
        default=1.0,
        low=0,
        saved=True,
        help="lambda, of the gradient's magnitude in the score; 0 is the authors' code",
    )
    soft: bool = parameter(
        default=False,
        saved=True,
        help="EM&S, the soft memory bound; K is what the layers have when the method is made",
    )

    published = Timing(every_epochs=5)
    grow = Random()
    saves = ("_budgets",)

    def _check(self) -> None:
        given = self._timing()
        free = given == Timing() and self.milestones is None and not callable(self.margin)
        milestones = self.milestones or _MILESTONES
        if free and self.total_steps is not None and self.total_epochs is not None:
            # All in steps, so that a training of few epochs has as many updates.
            first, second = (round(self.total_steps * m / _EPOCHS) for m in _MILESTONES)
            milestones = first, second
            usual = Timing(every=max(5 * self.total_steps // self.total_epochs, 1))
            every = fill_in(given, usual, self.total_steps, None).every
            self.every, self.until = every, None  # the milestones end the updates
        else:
            timing = fill_in(given, self.published, None, None)
            self.every, self.every_epochs, self.until, self.until_epochs = timing
        self.fraction = self.margin if callable(self.margin) else Margin(self.margin, milestones)
        self.drop = ByMagnitudeAndGradient(self.gradient_weight)

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
        extra = min(int(fraction * budget), pool.weight.size - budget)
        gone = max(now - budget, 0)
        slots = self.drop(pool, (gone + 0.5) / now) if gone else pool.weight.active()[:0]
        rows, cols = self.grow(pool, slots, extra, self.seed, self.epochs)
        self._exchange(pool, slots, rows, cols)

    def finalize(self) -> nn.Module:
        """As `Method.finalize`; with ``soft``, drops before what is above K, by magnitude."""
        if self.soft and self._attachment.attached:
            with torch.no_grad():
                for pool in self._trained():
                    slots = pool.weight.active()
                    order = torch.sort(pool.weight.values[slots].abs(), stable=True).indices
                    over = slots[order[: max(slots.numel() - self._budgets[pool.name], 0)]]
                    if over.numel():
                        self._exchange(pool, over, over[:0], over[:0])
        return super().finalize()

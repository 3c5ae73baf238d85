"""GraNet: gradual pruning with zero-cost neuroregeneration."""

from __future__ import annotations

from typing import Literal

import torch

from rewire.methods.core.base import Moments, Pool
from rewire.methods.core.parameters import fraction_field, moments_field
from rewire.methods.core.registry import register
from rewire.methods.core.updates import decay
from rewire.methods.criteria import gradients
from rewire.methods.criteria.drop import smallest
from rewire.methods.criteria.gradients import CandidateCount, candidates_field
from rewire.methods.criteria.grow import ByGradient
from rewire.methods.pruning.gradual import Gradual
from rewire.methods.pruning.shrink import scope_field
from rewire.nn import Event
from rewire.schedules import Schedule, at

__all__ = ["GraNet"]


@register(
    name="granet",
    paper="Liu et al., NeurIPS 2021 (arXiv 2106.10404)",
    summary="gradual magnitude pruning over the whole network; each cut also replaces weak "
    "weights by gradient",
    guarantees=("the schedule's K exact after every cut", "K at the end"),
    needs="gradients",
)
class GraNet(Gradual):
    """Every ``every`` steps from ``begin`` to ``until``::

        cut         the smallest |w| of the whole network, down to GMP's cubic schedule
        regenerate  in each layer, drop the floor(r K_l) smallest |w| of the K_l that are left, and
                    grow as many dormant positions with the largest |dL/dw|; r as a cosine to 0 at
                    the last update

    The authors start at half of all connections (`rewire train` does), or at all. Cost: that of the
    connections there are, and O(M samples) per update.
    """

    fraction: float | Schedule = fraction_field(
        0.5, "r at the start; a schedule (over steps) stays"
    )
    scope: Literal["layer", "network"] = scope_field(
        "network", "of the cut: the whole network (the paper) or each layer"
    )
    candidates: CandidateCount = candidates_field()
    moments: Moments = moments_field()

    start_density = 0.5
    keeps_limits = ()  # regrowth does not look at limits
    published = 1000

    def _check(self) -> None:
        super()._check()
        self.fraction = decay(self.fraction, self.until)
        self._grow = ByGradient(self.candidates)
        self._updating = False

    def _setup(self) -> None:
        super()._setup()
        for pool in self.pools:
            self._follow(pool, GraNet._changed)

    def _changed(self, pool: Pool, event: Event) -> None:
        if not self._updating:
            self._request_capture()

    def _wants_capture(self, step: int) -> bool:
        return self._cuts_at(step) and at(self.fraction, step) > 0

    def _prepare(self, pool: Pool) -> None:
        self._grow.request(pool, self.seed, self.steps + 1)

    def _after_step(self, pools: list[Pool]) -> None:
        if self._cuts_at(self.steps):
            self._updating = True
            try:
                self._prune_and_regenerate(pools, self._now("fraction", self.steps))
            finally:
                self._updating = False

    def _prune_and_regenerate(self, pools: list[Pool], fraction: float) -> None:
        """One exchange per pool: what was asked of the step (calls, candidates) belongs to the pool
        as it is.
        """
        targets = self.targets(self.steps)
        groups = [pools] if self.scope == "network" else [[pool] for pool in pools]
        for group in groups:
            places = self._ranked(group, sum(targets[pool.number] for pool in group))
            for pool, gone in zip(group, places, strict=True):
                weight, slots = pool.weight, pool.weight.active()
                left = torch.ones_like(slots, dtype=torch.bool)
                left[gone] = False
                rest = slots[left & ~weight.is_frozen(slots)]
                again = smallest(rest, weight.values[rest].abs(), int(fraction * rest.numel()))
                if again.numel() and gradients.waits(pool):
                    again = again[:0]
                dropped = torch.cat([again, slots[gone]])
                count = again.numel()
                if count:
                    rows, cols = self._grow(pool, dropped, count, self.seed, self.steps)
                else:
                    rows = cols = dropped[:0]
                self._exchange(pool, dropped, rows, cols)
                if weight.shared_seed is None:
                    weight.resize(weight.connections, [pool.optimizer])
        self.updates += 1

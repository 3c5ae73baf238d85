"""GraNet: gradual pruning with zero-cost neuroregeneration."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from rewire.methods.core.base import Moments, Pool
from rewire.methods.core.registry import register
from rewire.methods.core.updates import decay, in_steps
from rewire.methods.criteria import gradients
from rewire.methods.criteria.drop import smallest
from rewire.methods.criteria.gradients import CandidateCount
from rewire.methods.criteria.grow import Gradient
from rewire.methods.pruning.gmp import Gradual
from rewire.methods.pruning.shrink import Connections, Density, weakest
from rewire.nn import Event
from rewire.schedules import Schedule, at, within

__all__ = ["GraNet"]


@register(
    name="granet",
    paper="Liu et al., NeurIPS 2021 (arXiv 2106.10404)",
    summary="gradual magnitude pruning over the whole network; each cut also replaces weak "
    "weights by gradient",
    keeps_budget="every update",
    guarantees=("the schedule's K exact after every cut", "K at the end"),
    memory="O(M)",
    needs="gradients",
)
class GraNet(Gradual):
    """Every ``every`` steps from ``begin`` to ``until``::

        cut         the smallest |w| of the whole network, down to GMP's cubic schedule
        regenerate  in each layer, drop the floor(r K_l) smallest |w| of the K_l that are left, and
                    grow as many dormant positions with the largest |dL/dw|; r as a cosine to 0 at
                    the last update

    Args:
        fraction: r at the start; a schedule (over steps) is taken as it is.
        every: steps between updates; by default 1000, or in a training of known length as often as
            10 updates need.
        begin: step of the first one.
        until: step of the last one; by default half of ``steps`` where those are known.
        scope: of the cut: the "network" (the paper) or each "layer".
        candidates: of regrowth, see `rewire.methods.criteria.grow.Gradient`.
        connections, density, distribution: the final budget, see
            `rewire.methods.pruning.shrink.final_budgets`.
        steps: of the whole training; `rewire train` gives it.

    The authors start at half of all connections (`rewire train` does), or at all. Cost: that of the
    connections there are, and O(M samples) per update.
    """

    start_density: ClassVar[float | None] = 0.5
    #: Regrowth does not look at limits.
    keeps_limits: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        fraction: float | Schedule = 0.5,
        every: int | None = None,
        begin: int = 0,
        until: int | None = None,
        scope: Literal["layer", "network"] = "network",
        candidates: CandidateCount = "auto",
        connections: Connections | None = None,
        density: Density | None = None,
        distribution: str = "erk",
        steps: int | None = None,
        moments: Moments = "auto",
        seed: int | None = None,
    ) -> None:
        every, until = in_steps(every, until, 1000, steps, last=0.5, begin=begin)
        self.fraction = decay(fraction, until)
        self._grow = Gradient(candidates)
        super().__init__(
            model,
            optimizer,
            every=every,
            begin=begin,
            until=until,
            connections=connections,
            density=density,
            distribution=distribution,
            scope=scope,
            moments=moments,
            seed=seed,
        )
        here = weakref.ref(self)

        def changed(event: Event) -> None:
            method = here()
            if method is not None and not method._updating:
                method._request_capture()

        self._updating = False
        for pool in self.pools:
            self._attachment.follow(pool, changed)

    def _wants_capture(self, step: int) -> bool:
        return self._cuts_at(step) and at(self.fraction, step) > 0

    def _prepare(self, pool: Pool) -> None:
        self._grow.request(pool, self.seed, self.steps + 1)

    def _after_step(self, pools: list[Pool]) -> None:
        if self._cuts_at(self.steps):
            self._updating = True
            try:
                self._prune_and_regenerate(
                    pools, within("fraction", at(self.fraction, self.steps), 0.0, 1.0)
                )
            finally:
                self._updating = False

    def _prune_and_regenerate(self, pools: list[Pool], fraction: float) -> None:
        """One exchange per pool: what was asked of the step (calls, candidates) belongs to the pool
        as it is.
        """
        targets = self.targets(self.steps)
        groups = [pools] if self.scope == "network" else [[pool] for pool in pools]
        for group in groups:
            places = weakest(
                [self._scores(pool) for pool in group], sum(targets[pool.number] for pool in group)
            )
            for pool, gone in zip(group, places, strict=True):
                weight, slots = pool.weight, pool.weight.active()
                left = torch.ones_like(slots, dtype=torch.bool)
                left[gone] = False
                rest = slots[left]
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

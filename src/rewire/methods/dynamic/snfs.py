"""SNFS, sparse networks from scratch: sparse momentum."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rewire.methods.core.base import Evaluate, Pool
from rewire.methods.core.parameters import Count, Share, Steps, parameter, setting
from rewire.methods.core.registry import register
from rewire.methods.criteria import gradients
from rewire.methods.criteria.drop import ByMagnitude
from rewire.methods.criteria.gradients import CandidateCount
from rewire.methods.criteria.grow import Grow
from rewire.methods.criteria.topk import TILE_ELEMENTS, gradient_block, recorded, top
from rewire.methods.dynamic.rewirer import Rewiring
from rewire.nn import Event
from rewire.schedules import Cosine, Schedule

__all__ = ["SNFS", "Momentum"]

#: The authors' floor of the annealed share.
FLOOR = 0.005
#: Steps that the averages of candidates cover, unless updates are closer to each other.
WINDOW = 10


class Momentum(Grow):
    """Exponential averages of gradients, and growth where they are largest. Kept by position
    (exact) or, for active connections and candidates, by slot for as long as the candidates stay.
    """

    needs = "gradients"
    keeps_allowed = True

    def __init__(self, beta: float, exact: bool, candidates: CandidateCount) -> None:
        self.beta, self.exact, self.candidates = beta, exact, candidates
        self.averages: dict[str, Tensor] = {}

    def request(self, pool: Pool, seed: int, step: int) -> None:
        """Ask for the next gradients; candidates are those of ``step``."""
        if self.exact:
            gradients.request(pool, None, seed, step)
        else:
            count = pool.weight.connections if self.candidates == "auto" else self.candidates
            gradients.request(pool, count, seed, step)

    def collect(self, pool: Pool) -> None:
        """Add the gradients of the step just made, in the scale that the optimizer used them in."""
        weight = pool.weight
        scale = recorded(pool).scale()
        if self.exact:
            block = gradient_block(pool)
            rows, cols = weight.matrix_shape
            mean = self.averages.setdefault(pool.name, block(0, 0).new_zeros(rows, cols))
            tile = max(1, TILE_ELEMENTS // cols)
            for start in range(0, rows, tile):
                stop = min(start + tile, rows)
                mean[start:stop].mul_(self.beta).add_(
                    block(start, stop), alpha=(1 - self.beta) * scale
                )
        elif weight.candidates is not None:
            new = torch.cat(gradients.probed(pool))
            mean = self.averages.setdefault(pool.name, torch.zeros_like(new))
            mean.mul_(self.beta).add_(new, alpha=(1 - self.beta) * scale)

    def share(self, pool: Pool, dropped: Tensor) -> float:
        """Mean magnitude over the active connections."""
        mean, slots = self.averages.get(pool.name), pool.weight.active()
        if mean is None or not slots.numel():
            return 0.0
        at = (
            (pool.weight.rows[slots].long(), pool.weight.cols[slots].long())
            if self.exact
            else slots
        )
        return float(mean[at].abs().double().mean())

    def __call__(
        self, pool: Pool, dropped: Tensor, count: int, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        mean, capacity = self.averages[pool.name], pool.weight.capacity
        if self.exact:
            rows, cols, _ = top(
                lambda start, stop: mean[start:stop],
                pool,
                dropped,
                count,
                at=lambda r, c: mean[r, c],
                absolute=True,
            )
            return rows, cols
        scores = torch.cat([mean[:capacity][dropped], mean[capacity:]])
        return gradients.best_candidates(pool, dropped, scores, count, seed, step)


@register(
    name="snfs",
    paper="Dettmers and Zettlemoyer 2019 (arXiv 1907.04840)",
    summary="sparse momentum: every epoch, grow where the momentum is largest, more in layers "
    "where it is large",
    guarantees=(
        "K exact in total at every moment",
        "layers grow in proportion to the mean momentum of their weights",
    ),
    needs="gradients",
)
class SNFS(Rewiring):
    """At the end of every epoch, with m an exponential average of the gradients (1 - beta per
    step)::

        drop   in each layer, the floor(fraction K) smallest |w|
        share  all that was dropped, over layers in proportion to the mean |m| of their connections
        grow   in each layer, the dormant positions with the largest |m|

    The paper keeps m for all positions. Here only ``exact`` does. Otherwise random dormant
    positions take part as candidates for the last ``window`` steps before an update, and m covers
    these steps, of candidates and connections alike; an update due at the end of an epoch is then
    made ``window`` steps later, and epochs that end in between have none of their own.

    Pools are enlarged as budget moves to them. Cost: O(K samples) per step of the window; exact O(M
    samples) per step.
    """

    fraction: Share | Schedule = parameter(
        default=0.5,
        help="share to replace; a number falls along a cosine to 0.005 at the end where that is "
        "known, a schedule stays",
    )
    beta: Share = setting(default=0.9, help="of the average, the paper's momentum")
    exact: bool = setting(
        default=False,
        help="keep m for all positions, updated at every step: O(M) memory and a dense gradient a "
        "step",
    )
    candidates: Count | Literal["auto"] = parameter(
        default="auto",
        help='random dormant positions per layer; "auto" for as many as it has connections (all '
        "positions: exact=True)",
    )
    window: Steps | None = setting(
        default=None,
        help="steps that m covers when it is not exact; by default 10, or ``every`` where that is "
        "fewer",
    )

    drop = ByMagnitude()
    saves = ("_left", "averaging.averages")

    def _check(self) -> None:
        super()._check()
        longest = self.every if self.every is not None and not self.exact else None
        if self.window is None:
            self.window = WINDOW if longest is None else min(WINDOW, longest)
        if longest is not None and self.window > longest:
            raise ValueError(
                "window must be a whole number of steps of at least 1 and at most "
                f"every={longest}, not {self.window}"
            )
        if self.exact:
            self.window = 1
        until = self.until_epochs if self.every is None else self.until
        if not callable(self.fraction) and until:
            self.fraction = Cosine(self.fraction, until, min(FLOOR, self.fraction))
        self.grow = self.averaging = Momentum(self.beta, self.exact, self.candidates)
        self.share = self.averaging.share

    def _setup(self) -> None:
        self._left = 0
        super()._setup()

    # --- when: the window of an update ends with it -----------------------------------------------

    def _updates_at(self, step: int) -> bool:
        return (
            (self._due > 0 and self._left == 1) if self.every is None else super()._updates_at(step)
        )

    def _wants_capture(self, step: int) -> bool:
        if self.averaging.exact:
            return True
        if self.every is None:
            return self._due > 0
        target = -(-step // self.every) * self.every
        assert self.window is not None
        return target - step < self.window and not self._stopped(target)

    def _prepare(self, pool: Pool) -> None:
        step = self.steps + 1
        window = self._due if self.every is None else -(-step // self.every) * self.every
        self.averaging.request(pool, self.seed, window)  # the same candidates all through a window

    def _after_step(self, pools: list[Pool]) -> None:
        if self.every is None and not self.averaging.exact and self._partial(pools):
            # gradients from before the window are in its first step: it begins with the next
            return
        if self._wants_capture(self.steps):
            for pool in pools:
                if pool.recorder is not None:  # else it was frozen when the step was asked for
                    self.averaging.collect(pool)
        super()._after_step(pools)
        self._left = max(self._left - 1, 0) if self._due else 0

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        if self.averaging.exact:
            if self._epoch_ends_with_update(self.epochs, last):
                self._update(self._trained(), self.epochs)
        elif self._epoch_ends_with_update(self.epochs, last) and not self._due:
            # (While a window is open, epochs only pass.)
            self._left = self.window or 1
            super()._after_epoch(evaluate, last)

    def _ready(self, pools: list[Pool]) -> list[Pool]:
        return [pool for pool in pools if pool.name in self.averaging.averages]

    def _update(self, pools: list[Pool], time: int) -> None:
        super()._update(pools, time)
        if not self.averaging.exact:
            self.averaging.averages.clear()

    def _ask_again_after_changes(self) -> None:
        super()._ask_again_after_changes()
        for pool in self.pools:
            self._follow(pool, SNFS._changed)

    def _changed(self, pool: Pool, event: Event) -> None:
        if not self.averaging.exact and not event.loaded:
            # of other connections, or of other candidates
            self.averaging.averages.pop(pool.name, None)

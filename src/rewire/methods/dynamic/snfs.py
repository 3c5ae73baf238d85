"""SNFS, sparse networks from scratch: sparse momentum."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.methods.core.base import Evaluate, Moments, Pool
from rewire.methods.core.registry import register
from rewire.methods.core.updates import in_epochs
from rewire.methods.criteria import gradients
from rewire.methods.criteria.drop import Magnitude
from rewire.methods.criteria.gradients import CandidateCount
from rewire.methods.criteria.topk import TILE_ELEMENTS, gradient_block, recorded, top
from rewire.methods.dynamic.rewirer import Rewirer
from rewire.nn import Event
from rewire.schedules import Cosine, Schedule, within

__all__ = ["SNFS", "Momentum"]

#: The authors' floor of the annealed share.
FLOOR = 0.005
#: Steps that the averages of candidates cover, unless updates are closer to each other.
WINDOW = 10


class Momentum:
    """Exponential averages of gradients, and growth where they are largest. Kept by position
    (exact) or, for active connections and candidates, by slot for as long as the candidates stay.
    """

    needs: ClassVar[str] = "gradients"

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
    keeps_budget="every step",
    guarantees=(
        "K exact in total at every moment",
        "layers grow in proportion to the mean momentum of their weights",
    ),
    needs="gradients",
)
class SNFS(Rewirer):
    """At the end of every epoch, with m an exponential average of the gradients (1 - beta per
    step)::

        drop   in each layer, the floor(fraction K) smallest |w|
        share  all that was dropped, over layers in proportion to the mean |m| of their connections
        grow   in each layer, the dormant positions with the largest |m|

    The paper keeps m for all positions. Here only ``exact`` does. Otherwise random dormant
    positions take part as candidates for the last ``window`` steps before an update, and m covers
    these steps, of candidates and connections alike; an update due at the end of an epoch is then
    made ``window`` steps later, and epochs that end in between have none of their own.

    Args:
        fraction: share to replace; a number anneals along a cosine to 0.005 at ``until`` where that
            is known, a schedule (over epochs or steps) is taken as it is.
        beta: of the average, the paper's momentum.
        exact: keep m for all positions, updated at every step: O(M) memory, a dense gradient per
            step.
        candidates: how many random dormant positions per layer; "auto" for as many as it has
            connections.
        window: steps that m covers when it is not exact; by default 10, or ``every`` where that is
            fewer.
        every: "epoch", or a number of optimizer steps, at least ``window``; by default "epoch", or
            in a training of known length as often as 10 updates need.
        until: no update after this many epochs (or steps); by default three quarters of a training
            of known length, else never stopping.
        steps, epochs: of the whole training; `rewire train` gives them.

    Pools are enlarged as budget moves to them. Cost: O(K samples) per step of the window; exact O(M
    samples) per step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        fraction: float | Schedule = 0.5,
        beta: float = 0.9,
        exact: bool = False,
        candidates: CandidateCount = "auto",
        window: int | None = None,
        every: int | Literal["epoch"] | None = None,
        until: int | None = None,
        steps: int | None = None,
        epochs: int | None = None,
        moments: Moments = "auto",
        seed: int | None = None,
    ) -> None:
        within("beta", beta, 0.0, 1.0)
        if gradients.checked_candidates(candidates) is None:
            raise ValueError(
                "candidates must be 'auto' or a number of at least 1; all positions are exact=True"
            )
        every, until = in_epochs(every, until, steps, epochs, scheduled=callable(fraction))
        longest = every if isinstance(every, int) and every >= 1 and not exact else None
        if window is None:
            window = WINDOW if longest is None else min(WINDOW, longest)
        if not isinstance(window, int) or window < 1 or (longest is not None and window > longest):
            most = "" if longest is None else f" and at most every={every}"
            raise ValueError(
                f"window must be a number of steps of at least 1{most}, not {window!r}"
            )
        if not callable(fraction) and until:
            fraction = Cosine(within("fraction", fraction, 0.0, 1.0), until, min(FLOOR, fraction))
        self.averaging, self.window, self._left = (
            Momentum(beta, exact, candidates),
            1 if exact else window,
            0,
        )
        super().__init__(
            model,
            optimizer,
            drop=Magnitude(),
            grow=self.averaging,
            fraction=fraction,
            every=every,
            until=until,
            share=self.averaging.share,
            moments=moments,
            seed=seed,
        )

    def _settings(self) -> dict[str, Any]:
        m = self.averaging
        return super()._settings() | {"beta": m.beta, "exact": m.exact, "window": self.window}

    # --- when: the window of an update ends with it -----------------------------------------------

    def _updates_at(self, step: int) -> bool:
        return (
            (self._due > 0 and self._left == 1)
            if self.every == "epoch"
            else super()._updates_at(step)
        )

    def _wants_capture(self, step: int) -> bool:
        if self.averaging.exact:
            return True
        if self.every == "epoch":
            return self._due > 0
        target = -(-step // self.every) * self.every
        return target - step < self.window and not self._stopped(target)

    def _prepare(self, pool: Pool) -> None:
        step = self.steps + 1
        window = self._due if self.every == "epoch" else -(-step // self.every) * self.every
        self.averaging.request(pool, self.seed, window)  # the same candidates all through a window

    def _after_step(self, pools: list[Pool]) -> None:
        if self.every == "epoch" and not self.averaging.exact and self._partial(pools):
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
            self._left = self.window
            super()._after_epoch(evaluate, last)

    def _ready(self, pools: list[Pool]) -> list[Pool]:
        return [pool for pool in pools if pool.name in self.averaging.averages]

    def _update(self, pools: list[Pool], time: int) -> None:
        super()._update(pools, time)
        if not self.averaging.exact:
            self.averaging.averages.clear()

    def _ask_again_after_changes(self) -> None:
        super()._ask_again_after_changes()
        here = weakref.ref(self)

        def changed(event: Event, name: str) -> None:
            method = here()
            if method is not None and not method.averaging.exact and not event.loaded:
                # of other connections, or of other candidates
                method.averaging.averages.pop(name, None)

        for pool in self.pools:
            self._attachment.follow(pool, lambda event, name=pool.name: changed(event, name))

    def _state(self) -> dict[str, Any]:
        return super()._state() | {
            "left": self._left,
            "averages": {n: m.clone() for n, m in self.averaging.averages.items()},
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        devices, left = {pool.name: pool.weight.device for pool in self.pools}, int(state["left"])
        averages = {
            name: mean.to(devices[name], copy=True) for name, mean in state["averages"].items()
        }
        super()._load_state(state)
        self._left, self.averaging.averages = left, averages

"""MEST: memory-economic sparse training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from rewire.methods.core.base import Moments, Pool
from rewire.methods.core.registry import register
from rewire.methods.core.updates import in_steps, length
from rewire.methods.criteria.drop import MagnitudeAndGradient
from rewire.methods.criteria.grow import Random
from rewire.methods.dynamic.rewirer import Rewirer
from rewire.schedules import Schedule, within

__all__ = ["MEST", "Margin"]


@dataclass(frozen=True)
class Margin:
    """``start`` until ``milestones[0]`` (epochs), half of it until ``milestones[1]``, 0 from there
    on.
    """

    start: float
    milestones: tuple[int, int] = (90, 120)

    def __post_init__(self) -> None:
        given = tuple(self.milestones) if isinstance(self.milestones, Sequence) else ()
        if len(given) != 2 or not all(isinstance(m, int) and m >= 0 for m in given):
            raise ValueError(
                f"milestones must be two epochs of at least 0, not {self.milestones!r}"
            )

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
class MEST(Rewirer):
    """Every ``every`` epochs, in each layer, by the score |w| + weight |g| of the last step::

        EM     drop the floor(margin K) connections of lowest score, grow as many at random
        EM&S   drop all but the K of highest score, grow floor(margin K) at random:
               between updates K (1 + margin) exist

    New values are 0. Where the margin is 0, EM rests and EM&S returns to K for good.

    Args:
        margin: a schedule over epochs, or a number that is halved and then 0 as the authors'
            (`Margin`).
        milestones: epochs of these two changes, used with a number; by default the authors' 90 and
            120 of 160 epochs, in a training of known length the same shares of it.
        weight: lambda, of the gradient's magnitude in the score; 0 is the authors' code.
        soft: EM&S, the soft memory bound. K is what the layers have when the method is made.
        every: epochs between updates; by default 5, or in a training of known length as often as 10
            updates need.
        until: no update after this many epochs; EM&S then returns to K in finalize.
        steps, epochs: of the whole training; `rewire train` gives them.

    The score's form is recalled from the paper. Cost: O(K log K) per update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        margin: float | Schedule = 0.2,
        milestones: tuple[int, int] | None = None,
        weight: float = 1.0,
        soft: bool = False,
        every: int | None = None,
        until: int | None = None,
        moments: Moments = "auto",
        steps: int | None = None,
        epochs: int | None = None,
        seed: int | None = None,
    ) -> None:
        within("weight", weight, 0.0)
        steps, epochs = length("steps", steps), length("epochs", epochs)
        between: int | Literal["epoch"] = "epoch"
        given = every is not None or until is not None or milestones is not None or callable(margin)
        if not given and steps is not None and epochs is not None:
            # All in steps, so that a training of few epochs has as many updates.
            milestones = (round(steps * 90 / 160), round(steps * 120 / 160))
            between = in_steps(None, None, max(5 * steps // epochs, 1), steps)[0]
        every = 5 if every is None else every
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a number of epochs of at least 1, not {every!r}")
        if not callable(margin):
            margin = Margin(
                within("margin", margin, 0.0, 1.0), (90, 120) if milestones is None else milestones
            )
        self.weight, self.soft, self.epochs_between = weight, soft, every
        super().__init__(
            model,
            optimizer,
            drop=MagnitudeAndGradient(weight),
            grow=Random(),
            fraction=margin,
            every=between,
            until=until,
            moments=moments,
            seed=seed,
        )
        self._budgets = {pool.name: pool.weight.connections for pool in self.pools}

    def _schedule(self) -> str | None:
        until = "" if self.until is None else f", until={self.until}"
        return f"every={self.epochs_between} epochs, but not after the last{until}"

    def _epoch_ends_with_update(self, epoch: int, last: bool) -> bool:
        return super()._epoch_ends_with_update(epoch, last) and epoch % self.epochs_between == 0

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

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {
            "epochs": self.epochs_between,
            "soft": self.soft,
            "weight": self.weight,
        }

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"budgets": dict(self._budgets)}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        budgets = {name: int(state["budgets"][name]) for name in self._budgets}
        super()._load_state(state)
        self._budgets = budgets

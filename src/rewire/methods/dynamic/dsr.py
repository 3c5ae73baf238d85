"""DSR: dynamic sparse reparameterization."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.methods.core.base import Moments, Pool
from rewire.methods.core.registry import register
from rewire.methods.core.updates import in_steps
from rewire.methods.criteria.grow import Random
from rewire.methods.criteria.share import survivors
from rewire.methods.dynamic.rewirer import Rewirer
from rewire.schedules import Schedule, within

__all__ = ["DSR", "Threshold"]


@dataclass
class Threshold:
    """Everything below one magnitude all over the network; the magnitude is adapted so that it hits
    a share.

    After each use: doubled where fewer than ``(1 - tolerance)`` of the wanted number were below it,
    halved where more than ``(1 + tolerance)`` were. At least one connection stays in each layer:
    the largest (ties: the last).
    """

    magnitude: float
    tolerance: float = 0.1

    def __call__(self, pool: Pool, fraction: float) -> Tensor:
        return self.over([pool], fraction)[0]

    def over(self, pools: Sequence[Pool], fraction: float) -> list[Tensor]:
        """Slots of each pool that are below the threshold."""
        found, total = [], 0
        for pool in pools:
            slots = pool.weight.active()
            size = pool.weight.values[slots].abs()
            below = size < self.magnitude
            if slots.numel() and bool(below.all()):
                below[(size == size.max()).nonzero()[-1]] = False
            found.append(slots[below])
            total += slots.numel()
        wanted, got = fraction * total, sum(slots.numel() for slots in found)
        if got < (1 - self.tolerance) * wanted:
            self.magnitude = min(2 * self.magnitude, 1e30)
        elif got > (1 + self.tolerance) * wanted:
            self.magnitude = max(self.magnitude / 2, 1e-30)
        return found


@register(
    name="dsr",
    paper="Mostafa and Wang, ICML 2019 (arXiv 1902.05967)",
    summary="one adaptive magnitude threshold for all layers; random regrowth in proportion to "
    "what survives in each",
    keeps_budget="every step",
    guarantees=("K exact in total at every moment", "layers grow in proportion to their survivors"),
)
class DSR(Rewirer):
    """Every ``every`` steps, over all layers together::

        drop  |w| < H;  H doubles where fewer than (1 - tolerance) fraction K went,
                       halves where more than (1 + tolerance) fraction K went
        grow  as many at random, in layer l in proportion to the connections it has left

    The budget is kept in total and moves between layers: pools are enlarged as needed.

    Args:
        fraction: share of all connections to replace at an update, the target of H; a float or a
            schedule over steps.
        threshold: H at the start.
        tolerance: relative distance from the target up to which H stays.
        every: steps between updates; by default 500, or in a training of known length as often as
            10 updates need.
        until: no update after this many steps; by default three quarters of a training of known
            length, else never stopping.
        steps: of the whole training; `rewire train` gives it.

    Recalled from the paper, not read from its code. Cost: O(K log K) per update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        fraction: float | Schedule = 0.05,
        threshold: float = 1e-3,
        tolerance: float = 0.1,
        every: int | None = None,
        until: int | None = None,
        moments: Moments = "auto",
        steps: int | None = None,
        seed: int | None = None,
    ) -> None:
        within("threshold", threshold, 1e-30)
        within("tolerance", tolerance, 0.0, 1.0)
        every, until = in_steps(every, until, 500, steps)
        self.threshold = Threshold(float(threshold), tolerance)
        super().__init__(
            model,
            optimizer,
            drop=self.threshold,
            grow=Random(),
            fraction=fraction,
            every=every,
            until=until,
            share=survivors,
            moments=moments,
            seed=seed,
        )

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"threshold": self.threshold.magnitude}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        magnitude = float(state["threshold"])
        super()._load_state(state)
        self.threshold.magnitude = magnitude

"""`Rewirer`: a method composed of a drop criterion, a grow criterion, when, and how many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from rewire import random
from rewire.methods.base import Evaluate, Method, Pool, Purpose
from rewire.methods.drop import Drop
from rewire.methods.grow import Grow
from rewire.schedules import Schedule, at, checked, within

__all__ = ["NewValues", "Rewirer", "normal_values"]

#: Values of newly grown connections: ``(pool, count, seed, step) -> tensor``; None for 0.
NewValues = Callable[[Pool, int, int, int], Tensor]


def normal_values(std: float) -> NewValues:
    """New connections start at N(0, std^2)."""

    def draw(pool: Pool, count: int, seed: int, step: int) -> Tensor:
        device = pool.weight.device
        return std * random.normal(seed, step, pool.stream(Purpose.VALUE), count, device).to(pool.weight.dtype)

    return draw


class Rewirer(Method):
    """Drop, then grow as many: the budget of every layer is exact at every moment.

    Every ``every`` optimizer steps, or at the end of every epoch (but not after the last), each pool drops the
    connections that ``drop`` chooses and grows as many that ``grow`` chooses; what was just dropped may come back.
    Grown connections start at 0 (or at ``values``), their gradient and optimizer state afresh.

    Args:
        drop: criterion, see `rewire.methods.drop`.
        grow: criterion, see `rewire.methods.grow`; it must return as many connections as were dropped. Limits
            (`rewire.budget.Limits`) are accepted if its attribute ``keeps_limits`` has their kinds.
        fraction: share of a layer's connections to replace, in [0, 1]; a float or a schedule over optimizer steps, or
            over epochs where ``every`` is "epoch".
        every: number of optimizer steps between updates, or "epoch".
        until: no update after this many steps (or epochs); None for never stopping.
        values: of new connections, ``(pool, count, seed, step) -> tensor``; None for 0.
        momentum: "keep" the optimizer state of survivors, or "reset" all state of all parameters at every update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        drop: Drop,
        grow: Grow,
        fraction: float | Schedule,
        every: int | Literal["epoch"] = "epoch",
        until: int | None = None,
        values: NewValues | None = None,
        momentum: Literal["keep", "reset"] = "keep",
        seed: int | None = None,
    ) -> None:
        if every != "epoch" and (not isinstance(every, int) or every < 1):
            raise ValueError(f"every must be 'epoch' or a number of steps of at least 1, not {every!r}")
        if until is not None and (not isinstance(until, int) or until < 0):
            raise ValueError(f"until must be a number of steps or epochs of at least 0, or None, not {until!r}")
        if momentum not in ("keep", "reset"):
            raise ValueError(f"momentum must be 'keep' or 'reset', not {momentum!r}")
        self.momentum = momentum
        self.fraction = checked("fraction", fraction, 0.0, 1.0)
        self.drop, self.grow, self.every, self.until, self.values = drop, grow, every, until, values
        super().__init__(model, optimizer, seed=seed)

    def _limits_kept(self) -> tuple[str, ...]:
        return tuple(getattr(self.grow, "keeps_limits", ()))

    def _settings(self) -> dict[str, Any]:
        return {"every": self.every, "until": self.until}

    def _after_step(self, pools: list[Pool]) -> None:
        if self.every != "epoch" and self.steps % self.every == 0:
            self._update(pools, self.steps)

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        if self.every == "epoch" and not last:
            self._update(self._trained(), self.epochs)

    def _update(self, pools: list[Pool], time: int) -> None:
        if self.until is not None and time > self.until:
            return
        fraction = within("fraction", at(self.fraction, time), 0.0, 1.0)
        # What criteria look at, they see as it was before the update.
        sources = {id(s): s for s in (getattr(c, "source", None) for c in (self.drop, self.grow)) if s is not None}
        for source in sources.values():
            source.record(pools, self.seed, time)
        try:
            self._exchange_all(pools, fraction, time)
        finally:
            for source in sources.values():
                source.forget()
        if self.momentum == "reset":
            for optimizer in self.optimizers:
                optimizer.state.clear()
        self.updates += 1

    def _exchange_all(self, pools: list[Pool], fraction: float, time: int) -> None:
        for pool in pools:
            slots = self.drop(pool, fraction)
            rows, cols = self.grow(pool, slots, slots.numel(), self.seed, time)
            if not rows.numel() == cols.numel() == slots.numel():
                raise ValueError(
                    f"grow returned {rows.numel()} rows and {cols.numel()} columns for {pool.name}, but "
                    f"{slots.numel()} connections were dropped: the budget is kept only if as many grow"
                )
            new = self.values(pool, slots.numel(), self.seed, time) if self.values else 0.0
            self._exchange(pool, slots, rows, cols, new)

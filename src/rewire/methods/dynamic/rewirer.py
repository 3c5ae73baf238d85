"""`Rewirer`: a method composed of a drop criterion, a grow criterion, when, and how many."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire import random
from rewire.methods.core.attachment import gradient_scale
from rewire.methods.core.base import Evaluate, Method, Moments, Pool, Purpose
from rewire.methods.core.recording import Status
from rewire.methods.core.settings import choice
from rewire.methods.criteria import gradients
from rewire.methods.criteria.drop import Drop
from rewire.methods.criteria.grow import Grow
from rewire.methods.criteria.share import Share, spread
from rewire.nn import Event
from rewire.nn.optimizers.followers import gathered, restart_optimizer_state
from rewire.schedules import Schedule, at, checked, within

__all__ = ["NewValues", "Rewirer", "normal_values"]

#: Values of newly grown connections: ``(pool, count, seed, step) -> tensor``; None for 0.
NewValues = Callable[[Pool, int, int, int], Tensor]


def normal_values(std: float) -> NewValues:
    """New connections start at N(0, std^2)."""

    def draw(pool: Pool, count: int, seed: int, step: int) -> Tensor:
        device = pool.weight.device
        return std * random.normal(seed, step, pool.stream(Purpose.VALUE), count, device).to(
            pool.weight.dtype
        )

    return draw


class Rewirer(Method):
    """Drop, then grow as many: the budget is exact at every moment, of every layer or (with
    ``share``) in total.

    Every ``every`` optimizer steps, or at the end of every epoch (but not after the last), each
    pool drops the connections that ``drop`` chooses and grows as many that ``grow`` chooses; what
    was just dropped may come back. Grown connections start at 0 (or at ``values``), their gradient
    and optimizer state afresh. A pool without dormant positions (K = M) is left alone, unless
    ``share`` lets other layers have what it drops.

    A criterion with ``needs = "gradients"`` (such as `rewire.methods.criteria.grow.Gradient`) is
    asked before the step whose gradients an update uses: ``criterion.request(pool, seed, step)``.
    An update due at the end of an epoch has no such step: it is then made after the first step of
    the next epoch. A criterion with ``needs = "last gradient"`` finds the gradient of the last
    step, as the optimizer used it, in ``pool.gradient``. A pool without such gradients (it took no
    part in the step) has no update this time. A drop criterion with a method ``over(pools,
    fraction)`` that returns one tensor of slots per pool decides over all layers at once.

    Args:
        drop: criterion, see `rewire.methods.criteria.drop`.
        grow: criterion, see `rewire.methods.criteria.grow`; it must return as many connections as
            it is asked for. Limits (`rewire.budget.Limits`) are accepted if its attribute
            ``keeps_limits`` has their kinds.
        fraction: share of a layer's connections to replace, in [0, 1]; a float or a schedule over
            optimizer steps, or over epochs where ``every`` is "epoch".
        every: number of optimizer steps between updates, or "epoch".
        until: no update after this many steps (or epochs); None for never stopping.
        values: of new connections, ``(pool, count, seed, step) -> tensor``; None for 0.
        momentum: "keep" the optimizer state of survivors, or "reset" all state of all parameters
            (in a `Group`, of the method's own weights) at every update.
        share: None: each layer grows what it dropped. Else how the total is spread over layers, see
            `rewire.methods.criteria.share`; pools are enlarged as needed (under DDP choose
            ``capacity=`` beforehand).
        regrown: connections that are dropped and grow again in the same update start afresh
            ("new"), or have never gone ("keep": value and optimizer state stay).
    """

    needs_room = True

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
        share: Share | None = None,
        regrown: Literal["new", "keep"] = "new",
        moments: Moments = "auto",
        seed: int | None = None,
    ) -> None:
        if every != "epoch" and (not isinstance(every, int) or every < 1):
            raise ValueError(
                f"every must be 'epoch' or a number of steps of at least 1, not {every!r}"
            )
        if until is not None and (not isinstance(until, int) or until < 0):
            raise ValueError(
                f"until must be a number of steps or epochs of at least 0, or None, not {until!r}"
            )
        choice("momentum", momentum, ("keep", "reset"))
        self.momentum = momentum
        choice("regrown", regrown, ("new", "keep"))
        self.fraction = checked("fraction", fraction, 0.0, 1.0)
        self.drop, self.grow, self.every, self.until, self.values = drop, grow, every, until, values
        self.share, self.regrown = share, regrown
        self._asking: list[Any] = [
            c for c in (drop, grow) if getattr(c, "needs", "") == "gradients"
        ]
        self._reading = any(getattr(c, "needs", "") == "last gradient" for c in (drop, grow))
        self._due = 0  # the epoch whose update waits for the gradients of the next step; 0 for none
        super().__init__(model, optimizer, moments=moments, seed=seed)
        if self._asking:
            self._ask_again_after_changes()
        if self._reading:
            self._read_before_steps()

    def _limits_kept(self) -> tuple[str, ...]:
        # Where a budget moves, a layer may be asked for more than fits; a subclass has to claim
        # what it keeps.
        if self.share is not None:
            return ()
        kept: tuple[str, ...] = tuple(getattr(self.grow, "keeps_limits", ()))
        return (
            kept
            if type(self) is Rewirer
            else tuple(kind for kind in kept if kind in self.keeps_limits)
        )

    def _settings(self) -> dict[str, Any]:
        return {"every": self.every, "until": self.until}

    def _state(self) -> dict[str, Any]:
        compiled = [pool.name for pool in self.pools if pool.weight.traced]
        own: dict[str, Any] = {"due": self._due, "compiled": compiled} if self._asking else {}
        if self._reading:
            own["gradients"] = {
                p.name: p.gradient.clone() for p in self.pools if p.gradient is not None
            }
        return own

    def _load_state(self, state: Mapping[str, Any]) -> None:
        if self._reading:
            kept = dict(state.get("gradients", {}))
            for pool in self.pools:
                gradient = kept.get(pool.name)
                pool.gradient = (
                    None
                    if gradient is None
                    else gradient.to(pool.weight.values.detach(), copy=True)
                )
        if self._asking:
            due, compiled = int(state["due"]), list(state["compiled"])
            self._due = due
            for pool in self.pools:
                pool.weight.traced = pool.weight.traced or pool.name in compiled

    # --- when -------------------------------------------------------------------------------------

    def _schedule(self) -> str | None:
        when = (
            ("at the end of every epoch but the last")
            if self.every == "epoch"
            else f"every={self.every} steps"
        )
        return when if self.until is None else f"{when}, until={self.until}"

    def _stopped(self, time: int) -> bool:
        return self.until is not None and time > self.until

    def _updates_at(self, step: int) -> bool:
        """Whether an update is made after optimizer step ``step``."""
        if self.every == "epoch":
            return self._due > 0
        return step % self.every == 0 and not self._stopped(step)

    def _after_step(self, pools: list[Pool]) -> None:
        if self._updates_at(self.steps):
            if self.every == "epoch" and self._partial(pools):
                # gradients of the epoch before are in this step, from before they were asked for
                return
            time, self._due = self._due or self.steps, 0
            self._update(pools, time)

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        if self._epoch_ends_with_update(self.epochs, last):
            if self._asking:
                self._due = self.epochs
                self._request_capture()
            else:
                self._update(self._trained(), self.epochs)

    def _epoch_ends_with_update(self, epoch: int, last: bool) -> bool:
        return self.every == "epoch" and not last and not self._stopped(epoch)

    # --- gradients --------------------------------------------------------------------------------

    def _wants_capture(self, step: int) -> bool:
        return bool(self._asking) and self._updates_at(step)

    def _prepare(self, pool: Pool) -> None:
        for criterion in self._asking:
            criterion.request(pool, self.seed, self.steps + 1)

    def _partial(self, pools: list[Pool]) -> bool:
        return bool(self._asking) and any(
            gradients.status(pool) is Status.PARTIAL for pool in pools
        )

    def _ready(self, pools: list[Pool]) -> list[Pool]:
        """Those of the pools of which the update knows what it needs; others took no part in the
        step, say.
        """
        if self._asking:
            # A graph compiled since the request was made cannot be captured: those weights wait for
            # the next update.
            auto = any(getattr(c, "candidates", None) == "auto" for c in self._asking)
            found = [(pool, gradients.status(pool)) for pool in pools]
            pools = [
                pool
                for pool, status in found
                if status is not Status.NOTHING
                and not (status is Status.UNKNOWN and auto and pool.weight.traced)
            ]
        if self._reading:
            pools = [pool for pool in pools if pool.gradient is not None]
        return pools

    def _read_before_steps(self) -> None:
        """Keep the gradient of the last step before an update, which may be gone by then."""
        here = weakref.ref(self)

        def before(optimizer: Optimizer) -> None:
            method = here()
            if method is not None:
                method._read(optimizer)

        def changed(event: Event, pool: Pool | None) -> None:
            if pool is not None and pool.gradient is not None:
                if event.source is not None:
                    pool.gradient = gathered(pool.gradient, event.source, 0.0)
                pool.gradient.index_fill_(0, event.slots, 0.0)

        self._attachment.before_step(before)
        for pool in self.pools:
            alone = weakref.ref(pool)
            self._attachment.follow(pool, lambda event, pool=alone: changed(event, pool()))

    def _read(self, optimizer: Optimizer) -> None:
        if self.every == "epoch":
            wanted = self._epoch_ends_with_update(self.epochs + 1, False)
        else:
            wanted = self._updates_at(self.steps + 1)
        if not wanted:
            return
        divisor = gradient_scale(optimizer)
        for pool in self.pools:
            gradient = pool.weight.values.grad
            if pool.optimizer is optimizer and gradient is not None:
                pool.gradient = gradient / divisor if divisor != 1 else gradient.clone()

    def _ask_again_after_changes(self) -> None:
        """A change of a pool discards what was asked for (candidates might not be dormant any
        more).
        """
        here = weakref.ref(self)

        def changed(event: Event) -> None:
            method = here()
            if method is not None:
                method._request_capture()

        for pool in self.pools:
            self._attachment.follow(pool, changed)

    # --- the update -------------------------------------------------------------------------------

    def _update(self, pools: list[Pool], time: int) -> None:
        fraction = within("fraction", at(self.fraction, time), 0.0, 1.0)
        pools = self._ready(pools)
        # What criteria look at, they see as it was before the update.
        sources = {
            id(s): s
            for s in (getattr(c, "source", None) for c in (self.drop, self.grow))
            if s is not None
        }
        for source in sources.values():
            source.record(pools, self.seed, time)
        try:
            self._exchange_all(pools, fraction, time)
        finally:
            for source in sources.values():
                source.forget()
        if self.momentum == "reset":
            for optimizer in self.optimizers:
                for parameter in self._attachment.parameters(optimizer):
                    restart_optimizer_state(optimizer, parameter)
        for pool in self.pools if self._reading else ():
            pool.gradient = None
        self.updates += 1

    def _exchange_all(self, pools: list[Pool], fraction: float, time: int) -> None:
        if self.share is None:  # a full pool could only grow what it dropped
            pools = [pool for pool in pools if pool.weight.connections < pool.weight.size]
        over = getattr(self.drop, "over", None)
        dropped = over(pools, fraction) if over else [self.drop(pool, fraction) for pool in pools]
        counts = [slots.numel() for slots in dropped]
        if self.share is not None:
            room = [
                p.weight.size - p.weight.connections + n for p, n in zip(pools, counts, strict=True)
            ]
            shares = [self.share(pool, slots) for pool, slots in zip(pools, dropped, strict=True)]
            counts = spread(sum(counts), shares, room)
        for pool, slots, count in zip(pools, dropped, counts, strict=True):
            self._exchange_one(pool, slots, count, time)

    def _exchange_one(self, pool: Pool, slots: Tensor, count: int, time: int) -> None:
        rows, cols = self.grow(pool, slots, count, self.seed, time)
        if not rows.numel() == cols.numel() == count:
            raise ValueError(
                f"grow returned {rows.numel()} rows and {cols.numel()} columns for "
                f"{pool.name}, but "
                f"{count} connections were dropped: the budget is kept only if as many grow"
            )
        if self.regrown == "keep":
            slots, rows, cols = without_regrown(pool, slots, rows, cols)
        new = self.values(pool, rows.numel(), self.seed, time) if self.values else 0.0
        self._exchange(pool, slots, rows, cols, new)


def without_regrown(
    pool: Pool, slots: Tensor, rows: Tensor, cols: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots to drop and positions to grow, without those that are both."""
    n_cols = pool.weight.matrix_shape[1]
    old = pool.weight.rows[slots].long() * n_cols + pool.weight.cols[slots].long()
    new = rows * n_cols + cols
    grows = ~torch.isin(new, old)
    return slots[~torch.isin(old, new)], rows[grows], cols[grows]

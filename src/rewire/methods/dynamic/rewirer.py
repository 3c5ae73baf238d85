"""`Rewiring`: a method of a drop criterion, a grow criterion, when to update, and how many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from rewire import random
from rewire.methods.core.base import Evaluate, Method, Moments, Pool, Purpose
from rewire.methods.core.parameters import (
    Epochs,
    Steps,
    fraction_field,
    moments_field,
    parameter,
    service,
    setting,
)
from rewire.methods.core.pool import gradient_scale
from rewire.methods.core.recording import Status
from rewire.methods.core.updates import LEAST, Timing, fill_in
from rewire.methods.criteria import gradients
from rewire.methods.criteria.criterion import Criterion
from rewire.methods.criteria.drop import Drop
from rewire.methods.criteria.grow import Grow
from rewire.methods.criteria.share import Share, spread
from rewire.nn import Event
from rewire.nn.optimizers.followers import gathered, restart_optimizer_state
from rewire.schedules import Schedule, at, within

__all__ = ["NewValues", "Rewirer", "Rewiring", "normal_values", "optimizer_state_field"]

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


def optimizer_state_field(who: str) -> Any:
    """The declaration of ``optimizer_state``; ``who`` ("a new optimizer would") resets it too."""
    return parameter(
        default="keep",
        help="of survivors: keep it, or reset all state of all parameters at every update, as "
        f"{who}",
    )


class Rewiring(Method):
    """Drop, then grow as many: the budget is exact at every moment, of every layer or (with
    ``share``) in total.

    At each update every pool drops the connections that ``drop`` chooses and grows as many that
    ``grow`` chooses; what was just dropped may come back. Grown connections start at 0 (or at
    ``values``), their gradient and optimizer state afresh. A pool without dormant positions (K = M)
    is left alone, unless ``share`` lets other layers have what it drops. There is no update after
    the last epoch.

    A subclass sets ``drop``, ``grow`` and what else differs, as class attributes or in `_check`,
    and declares ``fraction`` and its own hyper-parameters.

    A criterion with ``needs = "gradients"`` is asked before the step whose gradients an update
    uses. An update due at the end of an epoch has no such step: it is then made after the first
    step of the next epoch. A criterion with ``needs = "last gradient"`` finds the gradient of the
    last step, as the optimizer used it, in ``pool.gradient``. A pool without such gradients (it
    took no part in the step) has no update this time.
    """

    every: Steps | None = setting(default=None, help="optimizer steps between updates; {timing}")
    every_epochs: Epochs | None = setting(
        default=None,
        help="update at the end of every so many epochs instead, but not after the last",
    )
    until: Steps | None = setting(
        default=None,
        low=0,
        help="no update after this many steps; by default three quarters of a training of known "
        "length, else there is no end",
    )
    until_epochs: Epochs | None = setting(
        default=None, low=0, help="the same in epochs, where updates come by epochs"
    )
    moments: Moments = moments_field()
    total_steps: Steps | None = service(default=None, help="optimizer steps of the whole training")
    total_epochs: Epochs | None = service(default=None, help="epochs of the whole training")

    needs_room = True
    keeps_prior = True
    #: As published, and updates that a training of known length has room for at least.
    published: ClassVar[Timing] = Timing(every_epochs=1)
    least: ClassVar[int] = LEAST

    drop: Drop = field(init=False)
    grow: Grow = field(init=False)
    #: Share of a layer's connections to replace; a schedule over steps, or over epochs where
    #: updates come by epochs.
    fraction: float | Schedule = field(init=False, default=0.3)
    #: Values of new connections; None for 0.
    values: NewValues | None = field(init=False, default=None)
    #: Connections that are dropped and grow again in the same update start afresh ("new"), or have
    #: never gone ("keep": value and optimizer state stay).
    regrown: Literal["new", "keep"] = field(init=False, default="new")
    #: "keep" the optimizer state of survivors, or "reset" all state of all parameters (in a
    #: `Group`, of the method's own weights) at every update.
    optimizer_state: Literal["keep", "reset"] = field(init=False, default="keep")
    #: None: each layer grows what it dropped. Else how the total is spread over layers, see
    #: `rewire.methods.criteria.share`; pools are enlarged as needed (under DDP choose ``capacity=``
    #: beforehand).
    share: Share | None = field(init=False, default=None)

    @classmethod
    def words(cls) -> Mapping[str, object]:
        """What the help of ``every`` says of the class's own timing."""
        timing = cls.published
        if timing.every is not None:
            when = f"by default {timing.every}"
        else:
            epochs = timing.every_epochs
            when = f"by default {'an update every epoch' if epochs == 1 else f'{epochs} epochs'}"
        return {"timing": f"{when}, or as often as {cls.least} updates need in a short training"}

    def _timing(self) -> Timing:
        return Timing(self.every, self.every_epochs, self.until, self.until_epochs)

    def _check(self) -> None:
        timing = fill_in(
            self._timing(),
            self.published,
            self.total_steps,
            self.total_epochs,
            least=self.least,
            fixed=callable(self.fraction),
        )
        self.every, self.every_epochs, self.until, self.until_epochs = timing

    def _setup(self) -> None:
        self._due = 0  # the epoch whose update waits for the gradients of the next step; 0 for none
        both: tuple[Criterion, Criterion] = (self.drop, self.grow)
        self._asking = [criterion for criterion in both if criterion.needs == "gradients"]
        self._reading = any(criterion.needs == "last gradient" for criterion in both)
        if self._asking:
            self._ask_again_after_changes()
        if self._reading:
            self._read_before_steps()

    def _limits_kept(self) -> tuple[str, ...]:
        # Where a budget moves, a layer may be asked for more than fits; a subclass has to claim
        # what it keeps.
        if self.share is not None:
            return ()
        claimed = self.keeps_limits
        return tuple(kind for kind in self.grow.keeps_limits if kind in claimed)

    def _prior_kept(self) -> tuple[str, ...]:
        kept = super()._prior_kept()
        return kept if self.grow.keeps_allowed else tuple(k for k in kept if k != "allowed")

    def _state(self) -> dict[str, Any]:
        own = super()._state()
        if self._asking:
            compiled = [pool.name for pool in self.pools if pool.weight.traced]
            own |= {"due": self._due, "compiled": compiled}
        if self._reading:
            kept = [pool for pool in self.pools if pool.gradient is not None]
            own["gradients"] = {pool.name: pool.gradient.clone() for pool in kept}  # type: ignore[union-attr]
        return own

    def _load_state(self, state: Mapping[str, Any]) -> None:
        due = int(state["due"]) if self._asking else 0
        compiled = list(state["compiled"]) if self._asking else []
        super()._load_state(state)
        if self._reading:
            kept = dict(state.get("gradients", {}))
            for pool in self.pools:
                gradient = kept.get(pool.name)
                like = pool.weight.values.detach()
                pool.gradient = None if gradient is None else gradient.to(like, copy=True)
        self._due = due
        for pool in self.pools:
            pool.weight.traced = pool.weight.traced or pool.name in compiled

    # --- when -------------------------------------------------------------------------------------

    def _schedule(self) -> str | None:
        return self._timing().words()

    def _stopped(self, time: int) -> bool:
        """Whether there are no updates any more at a step (an epoch, if updates come by epochs)."""
        until = self.until_epochs if self.every is None else self.until
        return until is not None and time > until

    def _updates_at(self, step: int) -> bool:
        """Whether an update is made after optimizer step ``step``."""
        if self.every is None:
            return self._due > 0
        return step % self.every == 0 and not self._stopped(step)

    def _epoch_ends_with_update(self, epoch: int, last: bool) -> bool:
        if self.every is not None or last or self._stopped(epoch):
            return False
        return epoch % (self.every_epochs or 1) == 0

    def _after_step(self, pools: list[Pool]) -> None:
        if self._updates_at(self.steps):
            if self.every is None and self._partial(pools):
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

    # --- gradients --------------------------------------------------------------------------------

    def _wants_capture(self, step: int) -> bool:
        return bool(self._asking) and self._updates_at(step)

    def _prepare(self, pool: Pool) -> None:
        for criterion in self._asking:
            criterion.request(pool, self.seed, self.steps + 1)

    def _partial(self, pools: list[Pool]) -> bool:
        return bool(self._asking) and any(gradients.status(p) is Status.PARTIAL for p in pools)

    def _ready(self, pools: list[Pool]) -> list[Pool]:
        """Those of the pools of which the update knows what it needs; others took no part in the
        step, say.
        """
        if self._asking:
            # A graph compiled since the request was made cannot be captured: those weights wait for
            # the next update.
            auto = any(criterion.candidates == "auto" for criterion in self._asking)
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

        def changed(pool: Pool, event: Event) -> None:
            if pool.gradient is not None:
                if event.source is not None:
                    pool.gradient = gathered(pool.gradient, event.source, 0.0)
                pool.gradient.index_fill_(0, event.slots, 0.0)

        self._before_step(Rewiring._read)
        for pool in self.pools:
            self._follow(pool, lambda method, pool, event: changed(pool, event))

    def _read(self, optimizer: Optimizer) -> None:
        if self.every is None:
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
        for pool in self.pools:
            self._follow(pool, lambda method, pool, event: method._request_capture())

    # --- the update -------------------------------------------------------------------------------

    def _update(self, pools: list[Pool], time: int) -> None:
        fraction = within("fraction", at(self.fraction, time), 0.0, 1.0)
        pools = self._ready(pools)
        # What criteria look at, they see as it was before the update.
        sources = {id(c.source): c.source for c in (self.drop, self.grow) if c.source is not None}
        for source in sources.values():
            source.record(pools, self.seed, time)
        try:
            self._exchange_all(pools, fraction, time)
        finally:
            for source in sources.values():
                source.forget()
        if self.optimizer_state == "reset":
            for optimizer in self.optimizers:
                for trained in self._attachment.parameters(optimizer):
                    restart_optimizer_state(optimizer, trained)
        for pool in self.pools if self._reading else ():
            pool.gradient = None
        self.updates += 1

    def _exchange_all(self, pools: list[Pool], fraction: float, time: int) -> None:
        if self.share is None:  # a full pool could only grow what it dropped
            pools = [pool for pool in pools if pool.weight.dormant]
        chosen = self.drop.over(pools, fraction)
        dropped = [
            slots[~pool.weight.is_frozen(slots)] for pool, slots in zip(pools, chosen, strict=True)
        ]
        counts = [slots.numel() for slots in dropped]
        if self.share is not None:
            room = [p.weight.dormant + n for p, n in zip(pools, counts, strict=True)]
            shares = [self.share(pool, slots) for pool, slots in zip(pools, dropped, strict=True)]
            counts = spread(sum(counts), shares, room)
        for pool, slots, count in zip(pools, dropped, counts, strict=True):
            self._exchange_one(pool, slots, count, time)

    def _exchange_one(self, pool: Pool, slots: Tensor, count: int, time: int) -> None:
        rows, cols = self.grow(pool, slots, count, self.seed, time)
        if not rows.numel() == cols.numel() == count:
            raise ValueError(
                f"grow returned {rows.numel()} rows and {cols.numel()} columns for {pool.name}, "
                f"but {count} connections were dropped: the budget is kept only if as many grow"
            )
        if self.regrown == "keep":
            slots, rows, cols = without_regrown(pool, slots, rows, cols)
        new = self.values(pool, rows.numel(), self.seed, time) if self.values else 0.0
        self._exchange(pool, slots, rows, cols, new)


class Rewirer(Rewiring):
    """A `Rewiring` put together by its constructor, for trials: no class is needed.

    Limits (`rewire.budget.Limits`) are accepted if the grow criterion's ``keeps_limits`` has their
    kinds, allowed positions if its ``keeps_allowed`` says so. Frozen connections that ``drop``
    chooses stay.
    """

    drop: Drop = parameter(default=None, help="criterion, see `rewire.methods.criteria.drop`")
    grow: Grow = parameter(default=None, help="criterion, see `rewire.methods.criteria.grow`")
    fraction: float | Schedule = fraction_field(
        0.3, "share of a layer's connections to replace at an update"
    )
    values: NewValues | None = parameter(
        default=None, help="of new connections, ``(pool, count, seed, step) -> tensor``; None for 0"
    )
    optimizer_state: Literal["keep", "reset"] = parameter(
        default="keep", help="of survivors: keep it, or reset all state of all parameters"
    )
    share: Share | None = parameter(
        default=None, help="how what was dropped is spread over layers; None: each grows its own"
    )
    regrown: Literal["new", "keep"] = parameter(
        default="new", help="what is dropped and grows again starts afresh, or has never gone"
    )

    keeps_limits = ("fan-in", "fan-out", "block")

    def _check(self) -> None:
        for name, kind in (("drop", Drop), ("grow", Grow)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name} must be a criterion, a "
                    f"rewire.methods.criteria.{name}.{kind.__name__}, not {getattr(self, name)!r}"
                )
        super()._check()


def without_regrown(
    pool: Pool, slots: Tensor, rows: Tensor, cols: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots to drop and positions to grow, without those that are both."""
    old = pool.keys(slots)
    new = rows * pool.weight.matrix_shape[1] + cols
    grows = ~torch.isin(new, old)
    return slots[~torch.isin(old, new)], rows[grows], cols[grows]

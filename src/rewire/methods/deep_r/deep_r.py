"""DEEP R: rewiring as sampling from a posterior, with the number of connections strictly kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from rewire import random
from rewire.methods.core.base import Method, Pool, Purpose
from rewire.methods.core.parameters import (
    NonNegative,
    PerLayer,
    Steps,
    parameter,
    per_layer,
    setting,
)
from rewire.methods.core.registry import register
from rewire.methods.core.runs import Run, suited_l1
from rewire.methods.core.slots import PerSlot
from rewire.methods.core.state import copied
from rewire.methods.criteria.grow import Scope, allot, random_dormant, random_in_rows
from rewire.methods.deep_r.dense_moments import DenseMoments
from rewire.methods.deep_r.heat import Heat
from rewire.methods.deep_r.signs import current_signs, neuron_signs, position_signs, signed
from rewire.nn import Event
from rewire.nn.weight.walk import regrow, walk
from rewire.ops import langevin_step_
from rewire.schedules import Schedule, at, within

__all__ = ["DeepR"]


@register(
    name="deep-r",
    paper="Bellec, Kappel, Maass, Legenstein, ICLR 2018 (arXiv 1711.05136)",
    summary="a random walk over weights and connections: what crosses zero is replaced at once by "
    "a random connection",
    guarantees=(
        "K exact after every step, per layer, per network or per neuron",
        "samples the posterior over networks (plain SGD, constant rate, every=1)",
        "a position (signs='fixed') or the neuron it leaves (signs='neuron') has one sign",
    ),
)
class DeepR(Method):
    """DEEP R (Algorithm 1 of the paper), after every optimizer step of rate eta.

    A connection has w = s theta with a sign s and theta >= 0; the optimizer has moved w along its
    gradient already::

        theta <- theta - eta l1 + sqrt(2 eta T) nu,   nu ~ N(0, 1)   on active connections
        theta < 0: it goes dormant, and one drawn uniformly from the dormant ones (it included)
                   becomes active with theta = 0

    L1 and noise are decoupled from the optimizer: not preconditioned, scaled or clipped; they use
    the rate that the step used. With plain SGD this is the paper's update; with momentum or Adam
    the state of a new connection starts afresh, as in RigL and SET. Weight decay on sparse values
    is refused.

    ``noise`` is that of the authors' code: T = eta noise^2 / 2. ``temperature="tied"`` is T = eta
    l1^2 / 18 as in the paper's experiments: it anneals with the rate, and the noise of a step is a
    third of its L1.

    ``signs="fixed"`` gives a grown connection its position's sign, a hash of seed, row and column,
    as in the authors' dense code; "redrawn" a new one each time, as in their sparse code; "neuron"
    (Dale's law, as in their spiking networks) one sign for all connections that leave a neuron, so
    a column of the weight or an input channel of a convolution, a hash of its number. The
    connections there are at construction start with the signs of their values, so a trained network
    keeps its function; but not with "neuron", where the first step gives each value the sign of its
    neuron.

    A frozen connection (`rewire.topology.Prior`) that crosses zero stays there, with its sign,
    until its gradient brings it back.

    ``moments="dense"`` lets momentum or Adam start on a grown connection from what they would be
    had the optimizer seen the position's gradient all along, as in LSNN's code. That takes O(M)
    memory and the dense gradient of every step (unscaled and unclipped), for SGD, Adam and AdamW.

    Cost: O(K) per step (one streaming pass, one merge of the index). State: one byte per slot (and
    see ``moments``).
    Guarantee: exactly K active slots after every step.
    """

    @classmethod
    def run_options(cls, run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
        """A stronger prior where steps have one length, whatever the gradient."""
        return suited_l1(run, given)

    l1: PerLayer = parameter(
        default=1e-5, low=0, help="the prior's coefficient alpha; schedules are over steps"
    )
    noise: NonNegative | Schedule | None = parameter(
        default=None, help="standard deviation of the noise over eta; by default 1e-5"
    )
    temperature: NonNegative | Schedule | Literal["tied"] | None = parameter(
        default=None, help="T itself instead of noise=, as in the paper"
    )
    scope: Scope = setting(
        default="layer",
        help='over what the budget is kept; "network": connections wander between layers, '
        '"neuron": every row keeps its fan-in',
    )
    signs: Literal["fixed", "redrawn", "neuron"] = setting(
        default="fixed", help="which sign a grown connection gets, see above"
    )
    allotment: Literal["uniform", "authors"] = setting(
        default="uniform",
        help='how scope "network" shares out new connections: over all dormant ones of the '
        "network, or by the layers' initial budgets as in the authors' code (which adds a prior on "
        "layers)",
    )
    every: Steps = setting(
        default=1,
        help="optimizer steps between rewirings. The paper's 1 keeps the law; with more, "
        "connections that crossed zero wait at 0, without effect, for the next rewiring",
    )
    moments: Literal["auto", "aged", "cleared", "dense"] = parameter(
        default="auto",
        help='what momentum or Adam start from on a grown connection: "dense" see above, the '
        "others see rewire.nn.follow_optimizer",
    )

    forbids_weight_decay = True
    needs_room = True
    keeps_prior = True
    keeps_limits = ("fan-in", "fan-out", "block")
    saves = ("_shares", "_waiting", "_begun")

    def _check(self) -> None:
        self.heat = Heat(self.noise, self.temperature)
        self._dense: list[DenseMoments] = []
        # By pool: learning rate, L1, heat, and what follows from them where they are no schedules.
        self._scales: dict[int, tuple[float, object, Heat, tuple[float, float]]] = {}

    def _setup(self) -> None:
        names = [pool.name for pool in self.pools]
        self.each_l1 = per_layer("l1", self.l1, names, 0.0)
        if self.moments == "dense":
            self._dense = [DenseMoments(pool) for pool in self.pools]
        if self.scope == "network":
            self._refuse_fixed_pools()
        # whether the event under way is `_regrow`'s, which sees to the signs itself
        self._own = False
        self._shares = [float(pool.weight.connections) for pool in self.pools]
        self._signs = PerSlot(self.pools, current_signs)
        self._begun = [self.signs != "neuron"] * len(self.pools)
        # By pool: what its random numbers are drawn by, beside seed and step; asked for in every
        # step.
        fixed = self.signs == "fixed"
        self._drawn: list[dict[str, Any]] = [
            {
                "noise_stream": pool.stream(Purpose.NOISE),
                "grow_stream": pool.stream(Purpose.GROW),
                "sign_stream": pool.stream(Purpose.SIGN if fixed else Purpose.REDRAW),
                "fixed": fixed,
            }
            for pool in self.pools
        ]
        self._waiting: list[Tensor] = [
            torch.empty(0, dtype=torch.int64, device=pool.weight.device) for pool in self.pools
        ]
        for pool in self.pools:
            self._follow(pool, DeepR._changed)

    def _refuse_fixed_pools(self) -> None:
        for pool in self.pools:
            weight = pool.weight
            if (
                weight.shared_seed is not None
                and weight.connections == weight.capacity < weight.positions
            ):
                raise ValueError(
                    f"{pool.name} has no empty slots, and under DDP it cannot get any: "
                    "scope='network' moves "
                    "connections between layers, so make the layers with a larger capacity="
                )

    # --- the step ---------------------------------------------------------------------------------

    def _after_step(self, pools: list[Pool]) -> None:
        # Where a pool keeps its own budget, and draws from all that is dormant, one native call
        # does all of it.
        at_once = self.scope == "layer" and self.signs != "neuron" and self.every == 1
        left = 0
        for pool in pools:
            if self._dense and self._dense[pool.number].wanted:
                self._dense[pool.number].update()
            if not self._begun[pool.number]:
                self._obey(pool)
            shrink, std = self._scale(pool)
            if at_once and not pool.weight.bound:
                self._walk(pool, shrink, std)
            else:
                left += 1
                self._diffuse(pool, shrink, std)
        if at_once and not left:
            self.updates += 1
        elif self.steps % self.every == 0:
            self._rewire()

    def _schedule(self) -> str | None:
        return f"every={self.every} steps"

    def _scale(self, pool: Pool) -> tuple[float, float]:
        """What L1 takes off in this step, and the standard deviation of the noise."""
        coefficient = self.each_l1[pool.number]
        known = self._scales.get(pool.number)
        if (
            known is not None
            and known[0] == pool.lr
            and known[1] is coefficient
            and known[2] is self.heat
        ):
            return known[3]
        l1 = within("l1", at(coefficient, self.steps), 0.0)
        scale = pool.lr * l1, self.heat.std(pool.lr, l1, self.steps)
        if not callable(coefficient) and self.heat.constant:
            self._scales[pool.number] = pool.lr, coefficient, self.heat, scale
        return scale

    def _wants_capture(self, step: int) -> bool:
        return any(dense.wanted for dense in self._dense)

    def _obey(self, pool: Pool) -> None:
        """Give every connection the sign of the neuron it leaves; its magnitude stays."""
        weight = pool.weight
        signs = neuron_signs(pool, weight.cols.clamp(min=0), self.seed)
        weight.values.copy_(signed(weight.values.abs(), signs))
        self._signs[pool.number] = signs
        self._begun[pool.number] = True

    def _walk(self, pool: Pool, shrink: float, std: float) -> None:
        """Noise, L1, the sign test and new connections for what crossed zero."""
        number = pool.number
        drawn, signs = self._drawn[number], self._signs[number]
        self._own = True
        try:
            slots = walk(pool.weight, signs, shrink, std, seed=self.seed, step=self.steps, **drawn)
        finally:
            self._own = False
        if count := slots.shape[0]:
            self._dropped[pool.name] += count
            self._grown[pool.name] += count
            self._began(pool, slots)

    def _diffuse(self, pool: Pool, shrink: float, std: float) -> None:
        """Noise, L1 and the sign test; what crossed zero waits."""
        weight = pool.weight
        values = weight.values
        crossed = langevin_step_(
            values,
            weight.rows,
            self._signs[pool.number],
            shrink,
            std,
            self.seed,
            self.steps,
            pool.stream(Purpose.NOISE),
        )
        weight.touched()
        kept = crossed[weight.is_frozen(crossed)]
        if kept.numel():
            # It stays, at zero, until its gradient brings it back with the sign that it has.
            crossed = crossed[~weight.is_frozen(crossed)]
            values[kept] = signed(values.new_zeros(()), self._signs[pool.number][kept])
        if self.every > 1:
            waiting = self._waiting[pool.number]
            values.index_fill_(0, waiting, 0.0)
            crossed = torch.unique(torch.cat([waiting, crossed]))
        self._waiting[pool.number] = crossed

    def _rewire(self) -> None:
        self.updates += 1
        # pools that have nothing waiting, or were dealt with by `_walk`, need no more
        if self.scope == "layer":
            pools = [pool for pool in self._trained() if self._waiting[pool.number].numel()]
        else:
            pools = self._trained()
        dropped = [self._waiting[pool.number] for pool in pools]
        for pool, slots in zip(pools, dropped, strict=True):
            self._waiting[pool.number] = slots[:0]
        if self.scope == "network" and pools:
            shares = (
                [self._shares[pool.number] for pool in pools]
                if self.allotment == "authors"
                else None
            )
            counts = allot(pools, dropped, shares, self.seed, self.steps)
        else:
            counts = [d.numel() for d in dropped]
        for pool, slots, count in zip(pools, dropped, counts, strict=True):
            if slots.numel() or count:
                self._replace(pool, slots, count)

    def _replace(self, pool: Pool, slots: Tensor, count: int) -> None:
        if self.scope == "layer" and self.signs != "neuron" and not pool.weight.bound:
            self._regrow(pool, slots)
            return
        if self.scope == "neuron":
            slots, rows, cols = random_in_rows(pool, slots, self.seed, self.steps)
        else:
            rows, cols = random_dormant(pool, slots, count, self.seed, self.steps)
        if self.signs == "fixed":
            sign = position_signs(pool, rows, cols, self.seed)
        elif self.signs == "neuron":
            sign = neuron_signs(pool, cols, self.seed)
        else:
            counter = torch.arange(count, device=rows.device)
            sign = 1 - 2 * (
                random.bits(self.seed, self.steps, pool.stream(Purpose.REDRAW), counter) & 1
            )
        # The sign of a connection at zero is the sign bit of its zero, so that it is saved with the
        # value.
        value = signed(torch.zeros((), device=rows.device), sign).to(pool.weight.dtype)
        self._began(pool, self._exchange(pool, slots, rows, cols, value))

    def _regrow(self, pool: Pool, slots: Tensor) -> None:
        """As `_replace` where every pool keeps its budget; in one pass."""
        fixed = self.signs == "fixed"
        self._own = True
        try:
            regrow(
                pool.weight,
                slots,
                self._signs[pool.number],
                seed=self.seed,
                step=self.steps,
                grow_stream=pool.stream(Purpose.GROW),
                sign_stream=pool.stream(Purpose.SIGN if fixed else Purpose.REDRAW),
                fixed=fixed,
            )
        finally:
            self._own = False
        self._dropped[pool.name] += slots.numel()
        self._grown[pool.name] += slots.numel()
        self._began(pool, slots)

    def _began(self, pool: Pool, slots: Tensor) -> None:
        """New connections are in ``slots``."""
        if self._dense:
            self._dense[pool.number].give(slots)

    # --- signs ------------------------------------------------------------------------------------

    def _changed(self, pool: Pool, event: Event) -> None:
        if self._own:
            return
        self._signs.changed(pool.number, event)
        if event.loaded:
            return
        waiting = self._waiting[pool.number]
        if waiting.numel():
            if event.source is not None:
                waiting = torch.isin(event.source, waiting).nonzero().flatten()
            self._waiting[pool.number] = waiting[~torch.isin(waiting, event.slots)]

    def _limits_kept(self) -> tuple[str, ...]:
        # What grows within its row knows no other row, and what wanders between layers may find no
        # room there.
        return {"layer": self.keeps_limits, "neuron": ("fan-in",), "network": ()}[self.scope]

    def _state(self) -> dict[str, Any]:
        dense = {moments.name: copied(moments.kept) for moments in self._dense}
        return super()._state() | {"moments": dense}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        kept = [
            {k: state["moments"][d.name][k].to(v, copy=True).view_as(v) for k, v in d.kept.items()}
            for d in self._dense
        ]
        super()._load_state(state)
        for dense, theirs in zip(self._dense, kept, strict=True):
            dense.kept = theirs
        self._signs.read()

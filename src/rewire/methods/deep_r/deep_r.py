"""DEEP R: rewiring as sampling from a posterior, with the number of connections strictly kept."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire import random
from rewire.methods.core.base import Method, Pool, Purpose
from rewire.methods.core.registry import register
from rewire.methods.core.settings import PerLayer, choice, per_layer
from rewire.methods.criteria.grow import Scope, allot, random_dormant, random_in_rows
from rewire.methods.deep_r.dense_moments import DenseMoments
from rewire.methods.deep_r.heat import Heat
from rewire.methods.deep_r.signs import SlotSigns, neuron_signs, position_signs, signed
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
    keeps_budget="every step",
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

    Args:
        l1: the prior's coefficient alpha. A number or a schedule over steps; or a list of them in
            the model's order, or a dict from glob pattern (``"conv*"``) to them.
        noise: standard deviation of the noise over eta, as in the authors' code: T = eta noise^2 /
            2. Default 1e-5.
        temperature: T itself instead, as in the paper; a float or a schedule over steps. Or "tied",
            T = eta l1^2 / 18 as in the paper's experiments: it anneals with the rate, and the noise
            of a step is a third of its L1.
        scope: over what the budget is kept: "layer", "network" (connections wander between layers)
            or "neuron" (every row keeps its fan-in).
        signs: which sign a grown connection gets: "fixed" (its position's, a hash of seed, row and
            column, as in the authors' dense code), "redrawn" (a new one each time, as in their
            sparse code) or "neuron" (Dale's law, as in their spiking networks: all connections that
            leave a neuron, so a column of the weight or an input channel of a convolution, have one
            sign, a hash of its number). The connections there are at construction start with the
            signs of their values, so a trained network keeps its function; but not with "neuron",
            where the first step gives each value the sign of its neuron.
        allotment: how scope "network" shares out new connections: "uniform" over all dormant ones
            of the network, or "authors", by the layers' initial budgets as in their code (which
            adds a prior on layers).
        every: optimizer steps between rewirings. The paper's 1 keeps the law; with more,
            connections that crossed zero wait at 0, without effect, for the next rewiring.
        moments: what momentum or Adam start from on a grown connection: "auto", "aged" or
            "cleared", see `rewire.nn.follow_optimizer`, or "dense", what they would be had the
            optimizer seen the position's gradient all along, as in LSNN's code. That takes O(M)
            memory and the dense gradient of every step (unscaled and unclipped), for SGD, Adam and
            AdamW.

    Cost: O(K) per step (one streaming pass, one merge of the index). State: one byte per slot (and
    see ``moments``).
    Guarantee: exactly K active slots after every step.
    """

    @classmethod
    def run_options(cls, epochs: int, given: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
        """A stronger prior where steps have one length, whatever the gradient.

        Adam moves a connection by about the rate in each step while its gradients agree, and by
        little while they do not. L1 takes off its share of the rate: connections whose gradients
        agree less than that die.
        """
        steps_of_one_length = optimizer in ("adam", "adamw", "rmsprop")
        return {"l1": 0.1} if steps_of_one_length and "l1" not in given else {}

    forbids_weight_decay = True
    needs_room = True
    keeps_limits: ClassVar[tuple[str, ...]] = ("fan-in", "fan-out", "block")

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        l1: PerLayer = 1e-5,
        noise: float | Schedule | None = None,
        temperature: float | Schedule | Literal["tied"] | None = None,
        scope: Scope = "layer",
        signs: Literal["fixed", "redrawn", "neuron"] = "fixed",
        allotment: Literal["uniform", "authors"] = "uniform",
        every: int = 1,
        moments: Literal["auto", "aged", "cleared", "dense"] = "auto",
        seed: int | None = None,
    ) -> None:
        choice("scope", scope, ("layer", "network", "neuron"))
        choice("signs", signs, ("fixed", "redrawn", "neuron"))
        choice("allotment", allotment, ("uniform", "authors"))
        choice("moments", moments, ("auto", "aged", "cleared", "dense"))
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a number of steps of at least 1, not {every}")
        self.heat = Heat(noise, temperature)
        self.scope, self.signs, self.allotment, self.every = scope, signs, allotment, every
        self._dense: list[DenseMoments] = []
        # By pool: learning rate, L1, heat, and what follows from them where they are no schedules.
        self._scales: dict[int, tuple[float, object, Heat, tuple[float, float]]] = {}
        # Dense moments are those of a connection that was there all along: of the optimizer's own
        # age.
        super().__init__(
            model, optimizer, moments="cleared" if moments == "dense" else moments, seed=seed
        )
        self.moments = moments
        self.l1 = per_layer("l1", l1, self.pools, 0.0)
        if moments == "dense":
            self._dense = [DenseMoments(pool) for pool in self.pools]
            self._request_capture()
        if scope == "network":
            self._refuse_fixed_pools()
        # whether the event under way is `_regrow`'s, which sees to the signs itself
        self._own = False
        self._shares = [float(pool.weight.connections) for pool in self.pools]
        self._signs = SlotSigns(self.pools)
        self._begun = [signs != "neuron"] * len(self.pools)
        # By pool: what its random numbers are drawn by, beside seed and step; asked for in every
        # step.
        fixed = signs == "fixed"
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
        here = weakref.ref(self)
        for i, pool in enumerate(self.pools):
            self._attachment.follow(pool, lambda event, i=i: _tell(here, i, event))

    def _refuse_fixed_pools(self) -> None:
        for pool in self.pools:
            weight = pool.weight
            if (
                weight.shared_seed is not None
                and weight.connections == weight.capacity < weight.size
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
            if at_once and pool.weight.limits is None:
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
        coefficient = self.l1[pool.number]
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
        if self.scope == "layer" and self.signs != "neuron" and pool.weight.limits is None:
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

    def _changed(self, number: int, event: Event) -> None:
        if self._own:
            return
        self._signs.changed(number, event)
        if event.loaded:
            return
        waiting = self._waiting[number]
        if waiting.numel():
            if event.source is not None:
                waiting = torch.isin(event.source, waiting).nonzero().flatten()
            self._waiting[number] = waiting[~torch.isin(waiting, event.slots)]

    def _limits_kept(self) -> tuple[str, ...]:
        # What grows within its row knows no other row, and what wanders between layers may find no
        # room there.
        return {"layer": self.keeps_limits, "neuron": ("fan-in",), "network": ()}[self.scope]

    def _settings(self) -> dict[str, Any]:
        names = ("scope", "signs", "allotment", "every")
        return {name: getattr(self, name) for name in names}

    def _state(self) -> dict[str, Any]:
        return {
            "shares": list(self._shares),
            "waiting": {p.name: w.clone() for p, w in zip(self.pools, self._waiting, strict=True)},
            "begun": list(self._begun),
            "moments": {
                p.name: {k: v.clone() for k, v in dense.kept.items()}
                for p, dense in zip(self.pools, self._dense, strict=False)
            },
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        shares = [float(s) for s in state["shares"]]
        waiting = [state["waiting"][p.name].to(p.weight.device, copy=True) for p in self.pools]
        begun = [bool(b) for b in state["begun"]]
        kept = [
            {k: state["moments"][d.name][k].to(v, copy=True).view_as(v) for k, v in d.kept.items()}
            for d in self._dense
        ]
        self._shares, self._waiting, self._begun = shares, waiting, begun
        for dense, theirs in zip(self._dense, kept, strict=True):
            dense.kept = theirs
        self._signs.read()


def _tell(method: weakref.ref[DeepR], number: int, event: Event) -> None:
    here = method()
    if here is not None:
        here._changed(number, event)

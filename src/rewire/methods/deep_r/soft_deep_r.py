"""soft-DEEP R: every potential connection performs a random walk, and those above zero are
active.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from rewire import random, topology
from rewire.methods.core.base import Method, Moments, Pool, Purpose
from rewire.methods.core.parameters import (
    NonNegative,
    PerLayer,
    moments_field,
    parameter,
    per_layer,
    setting,
)
from rewire.methods.core.registry import register
from rewire.methods.core.slots import PerSlot
from rewire.methods.deep_r.heat import Heat
from rewire.methods.deep_r.signs import current_signs, position_signs, signed
from rewire.ops import add_normal_
from rewire.schedules import Schedule, at, within

__all__ = ["SoftDeepR"]

_TINY, _HUGE, _BELOW_ONE = 1e-30, 1e30, 1.0 - 2.0**-24
_GRID = 1 << 24


@register(
    name="soft-deep-r",
    paper="Bellec, Kappel, Maass, Legenstein, ICLR 2018 (arXiv 1711.05136)",
    summary="DEEP R without a fixed budget: dormant connections keep a parameter that diffuses "
    "until it crosses zero",
    keeps_budget="no",
    memory="O(M)",
    guarantees=(
        "a share p_min of the connections is active where the loss does not care",
        "samples the posterior over networks (plain SGD, constant rate, boundary='reflect')",
        "no parameter is ever below theta_min",
    ),
)
class SoftDeepR(Method):
    """soft-DEEP R (Algorithm 2 of the paper), after every optimizer step of rate eta.

    Every potential connection has a parameter theta and a sign s; it is active, with w = s theta,
    while theta >= 0::

        active:   theta <- theta - eta (dE/dtheta + l1) + sqrt(2 eta T) nu          nu ~ N(0, 1)
        dormant:  theta <- theta + sqrt(2 eta T) nu, kept at or above theta_min

    How many are active follows from the loss: there is no budget, and what the pool is made with is
    only the start. The pool holds the active connections, as ever, and is enlarged when more become
    active than it has slots; the optimizer has stepped them along the gradient already. The dormant
    ones' theta lie in an array of M numbers that the method keeps: products are truly sparse, the
    method's memory is not.

    L1 and noise are decoupled from the optimizer and use the rate that its step used. A connection
    keeps its sign while it lives; one that becomes active has its position's (a hash of seed, row
    and column). Weight decay on sparse values is refused.

    ``p_min`` sets theta_min = -T (1 - p_min) / (l1 p_min) at every step. With ``boundary="clip"``
    (the paper) the law holds only up to sqrt(eta). ``start="authors"``: only those of the pool's
    connections are active at first whose value has its position's sign, about half, because the
    authors' code draws theta of both signs; the others start at theta_min. This happens at the
    first step, so that making the method changes nothing. All other dormant ones start at
    U(theta_min, 0).

    Positions that are not allowed stay dormant, and a frozen connection (`rewire.topology.Prior`)
    that crosses zero stays there, with its sign.

    Cost: O(M) per step. State: one number per potential connection, one byte per slot.
    """

    l1: PerLayer = parameter(
        default=1e-5, low=0, help="the prior's coefficient alpha; schedules are over steps"
    )
    noise: NonNegative | Schedule | None = parameter(
        default=None,
        help="standard deviation of the noise over eta, as in the authors' code: T = eta noise^2 / "
        "2; by default 1e-5",
    )
    temperature: NonNegative | Schedule | Literal["tied"] | None = parameter(
        default=None,
        help='T itself instead, as in the paper; "tied": T = eta l1^2 / 18 (the noise is a third '
        "of the L1 step, at every rate)",
    )
    p_min: PerLayer | None = parameter(
        default=None,
        low=_TINY,
        high=_BELOW_ONE,
        help="share of the connections that is active where the loss has no gradient; by default "
        "0.01, unless theta_min= is given",
    )
    theta_min: PerLayer | None = parameter(
        default=None, low=-_HUGE, high=-_TINY, help="the lower bound itself instead"
    )
    boundary: Literal["clip", "reflect"] = setting(
        default="clip",
        help="what happens at theta_min: the paper's bound, or theta <- 2 theta_min - theta",
    )
    start: Literal["all", "authors"] = setting(
        default="all", help="which connections are active at first, see above"
    )
    moments: Moments = moments_field()

    forbids_weight_decay = True
    keeps_prior = True
    saves = ("_begun",)

    def _check(self) -> None:
        if self.p_min is not None and self.theta_min is not None:
            raise ValueError(
                "give p_min= or theta_min=, not both: theta_min = -T (1 - p_min) / (l1 p_min)"
            )
        self.heat = Heat(self.noise, self.temperature)

    def _setup(self) -> None:
        pools, names = self.pools, [pool.name for pool in self.pools]
        self.each_l1 = per_layer("l1", self.l1, names, 0.0)
        share = 0.01 if self.p_min is None else self.p_min
        bound = self.theta_min
        self.each_share = per_layer("p_min", share, names, _TINY, _BELOW_ONE)
        self.each_bound = (
            None if bound is None else per_layer("theta_min", bound, names, -_HUGE, -_TINY)
        )
        self._signs = PerSlot(pools, current_signs)
        self._dormant: list[Tensor] = []
        for pool in pools:
            self._attachment.follow(pool, self._signs.follower(pool.number))
            low = self._lowest(pool, 0)
            if low > -_TINY:
                raise ValueError(
                    "p_min sets theta_min = -T (1 - p_min) / (l1 p_min), which is 0 for "
                    f"{pool.name}, because its temperature is: give noise= or temperature= above "
                    "0, or theta_min= itself"
                )
            self._refuse_fixed(pool)
            self._dormant.append(self._first_dormant(pool, low))
        self._begun = [self.start == "all"] * len(pools)

    def _refuse_fixed(self, pool: Pool) -> None:
        if pool.weight.shared_seed is not None and pool.weight.capacity < pool.weight.size:
            raise ValueError(
                f"{pool.name} has {pool.weight.capacity} slots, and under DDP it cannot get more: "
                f"soft-DEEP R has no budget, so make the layer with capacity={pool.weight.size}"
            )

    # --- the step ---------------------------------------------------------------------------------

    def _after_step(self, pools: list[Pool]) -> None:
        for pool in pools:
            self._walk(pool)
        self.updates += 1

    def _walk(self, pool: Pool) -> None:
        """One step of every theta of the pool, then the connections that crossed zero change
        places.
        """
        weight, dormant, number = pool.weight, self._dormant[pool.number], pool.number
        # at T = 0 a bound of 0 would make everything active
        low = min(self._lowest(pool, self.steps), -_TINY)
        l1 = within("l1", at(self.each_l1[number], self.steps), 0.0)
        std = self.heat.std(pool.lr, l1, self.steps)
        frozen = weight.is_frozen(torch.arange(weight.capacity, device=weight.device))
        if not self._begun[number]:
            own = position_signs(pool, weight.rows, weight.cols, self.seed)
            self._signs[number] = torch.where(frozen, self._signs[number], own)
            self._begun[number] = True
        active, sign = weight.rows >= 0, self._signs[number].to(dormant.dtype)
        theta = sign * weight.values.detach().to(dormant.dtype) - pool.lr * l1
        if std:
            add_normal_(theta, std, self.seed, self.steps, pool.stream(Purpose.NOISE))
            add_normal_(dormant, std, self.seed, self.steps, pool.stream(Purpose.GROW))
        theta[frozen] = theta[frozen].clamp(min=0)
        self._bound(dormant, low)
        position = weight.rows.long() * weight.matrix_shape[1] + weight.cols.long()
        # Entries of active connections mean nothing; theta_min is where one starts that is dropped
        # from outside.
        dormant[position[active]] = low
        grown = (dormant >= 0).nonzero().flatten()
        if pool.allowed is not None:
            inside = topology.contains(pool.allowed.keys, grown)
            dormant[grown[~inside]] = low
            grown = grown[inside]
        value = dormant[grown]
        dormant[grown] = low
        stays = active & (theta >= 0)
        crossed = (active & ~stays).nonzero().flatten()
        dormant[position[crossed]] = self._bound(theta[crossed], low)
        new = signed(theta, sign).to(weight.dtype)
        weight.values.copy_(torch.where(stays, new, torch.zeros_like(new)))
        if crossed.numel() or grown.numel():
            rows, cols = grown // weight.matrix_shape[1], grown % weight.matrix_shape[1]
            sign = position_signs(pool, rows, cols, self.seed)
            self._exchange(pool, crossed, rows, cols, signed(value, sign).to(weight.dtype))

    def _bound(self, theta: Tensor, low: float) -> Tensor:
        """Keep ``theta`` at or above ``low``, in place. What reflection would carry up into
        activity stays at ``low``: it overshot the whole dormant range, by a gradient step or
        because ``low`` has just moved.
        """
        if self.boundary == "reflect":
            mirrored = 2 * low - theta
            theta.copy_(torch.where(theta < low, torch.where(mirrored < 0, mirrored, low), theta))
            return theta
        return theta.clamp_(min=low)

    def _lowest(self, pool: Pool, step: int) -> float:
        """theta_min of the pool at ``step``."""
        if self.each_bound is not None:
            return within("theta_min", at(self.each_bound[pool.number], step), -_HUGE, -_TINY)
        share = within("p_min", at(self.each_share[pool.number], step), _TINY, _BELOW_ONE)
        l1 = within("l1", at(self.each_l1[pool.number], step), 0.0)
        if not l1:
            raise ValueError(
                f"p_min sets theta_min = -T (1 - p_min) / (l1 p_min), and l1 of {pool.name} is 0 "
                f"(step {step}): keep l1 above 0, or give theta_min="
            )
        return -self.heat.at(pool.lr, l1, step) * (1 - share) / (l1 * share)

    def _first_dormant(self, pool: Pool, low: float) -> Tensor:
        """theta of every position: U(low, 0), and ``low`` at the active ones."""
        weight = pool.weight
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        index = torch.arange(weight.size, device=weight.device)
        uniform = 1 + random.bits(self.seed, 0, pool.stream(Purpose.GROW), index) % _GRID
        theta = (low * (uniform.double() / _GRID)).to(kind)
        active = weight.rows >= 0
        theta[weight.rows[active].long() * weight.matrix_shape[1] + weight.cols[active].long()] = (
            low
        )
        return theta

    # --- saving -----------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        dormant = {p.name: d.clone() for p, d in zip(self.pools, self._dormant, strict=True)}
        return super()._state() | {"dormant": dormant}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        loaded = []
        for pool, mine in zip(self.pools, self._dormant, strict=True):
            theirs = state["dormant"][pool.name]
            if theirs.shape != mine.shape:
                raise ValueError(
                    f"this is the state of a model where {pool.name} has {theirs.numel()} "
                    f"potential connections, not {mine.numel()}"
                )
            loaded.append(theirs.to(mine, copy=True))
        super()._load_state(state)
        self._dormant = loaded
        self._signs.read()

"""soft-DEEP R: every potential connection performs a random walk, and those above zero are
active.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire import random
from rewire.methods.core.base import Method, Moments, Pool, Purpose
from rewire.methods.core.registry import register
from rewire.methods.core.settings import PerLayer, choice, per_layer
from rewire.methods.deep_r.heat import Heat
from rewire.methods.deep_r.signs import SlotSigns, position_signs, signed
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

    Args:
        l1: the prior's coefficient alpha. A number or a schedule over steps; or a list of them in
            the model's order, or a dict from glob pattern to them.
        noise: standard deviation of the noise over eta, as in the authors' code: T = eta noise^2 /
            2. Default 1e-5.
        temperature: T itself instead, as in the paper; or "tied", T = eta l1^2 / 18 (the noise is
            then a third of the L1 step, at every rate). A float or a schedule over steps.
        p_min: share of the connections that is active where the loss has no gradient, in (0, 1): it
            sets theta_min = -T (1 - p_min) / (l1 p_min) at every step. One number or one per layer,
            as for ``l1``.
        theta_min: the lower bound itself instead, below 0. One number or one per layer.
        boundary: what happens at theta_min: "clip" (the paper) or "reflect" (theta <- 2 theta_min -
            theta, without which the law holds only up to sqrt(eta)).
        start: which of the pool's connections are active at first: "all", with the signs of their
            values, or "authors": those whose value has its position's sign, about half, because
            their code draws theta of both signs. The others start at theta_min. This happens at the
            first step, so that making the method changes nothing. All other dormant ones start at
            U(theta_min, 0).

    Cost: O(M) per step. State: one number per potential connection, one byte per slot.
    """

    forbids_weight_decay = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        l1: PerLayer = 1e-5,
        noise: float | Schedule | None = None,
        temperature: float | Schedule | Literal["tied"] | None = None,
        p_min: PerLayer | None = None,
        theta_min: PerLayer | None = None,
        boundary: Literal["clip", "reflect"] = "clip",
        start: Literal["all", "authors"] = "all",
        moments: Moments = "auto",
        seed: int | None = None,
    ) -> None:
        choice("boundary", boundary, ("clip", "reflect"))
        choice("start", start, ("all", "authors"))
        if p_min is not None and theta_min is not None:
            raise ValueError(
                "give p_min= or theta_min=, not both: theta_min = -T (1 - p_min) / (l1 p_min)"
            )
        self.heat = Heat(noise, temperature)
        self.boundary, self.start = boundary, start
        super().__init__(model, optimizer, moments=moments, seed=seed)
        pools = self.pools
        self.l1 = per_layer("l1", l1, pools, 0.0)
        share = 0.01 if p_min is None else p_min
        self.p_min = (
            None if theta_min is not None else per_layer("p_min", share, pools, _TINY, _BELOW_ONE)
        )
        self.theta_min = (
            None if theta_min is None else per_layer("theta_min", theta_min, pools, -_HUGE, -_TINY)
        )
        self._signs = SlotSigns(pools)
        self._dormant: list[Tensor] = []
        for pool in pools:
            self._attachment.follow(pool, self._signs.follower(pool.number))
            low = self._lowest(pool, 0)
            if low > -_TINY:
                raise ValueError(
                    "p_min sets theta_min = -T (1 - p_min) / (l1 p_min), which is 0 for "
                    f"{pool.name}, because its "
                    "temperature is: give noise= or temperature= above 0, or theta_min= itself"
                )
            self._refuse_fixed(pool)
            self._dormant.append(self._first_dormant(pool, low))
        self._begun = [start == "all"] * len(pools)

    def _refuse_fixed(self, pool: Pool) -> None:
        if pool.weight.shared_seed is not None and pool.weight.capacity < pool.weight.size:
            raise ValueError(
                f"{pool.name} has {pool.weight.capacity} slots, and under DDP it cannot get more: "
                "soft-DEEP R has no "
                f"budget, so make the layer with capacity={pool.weight.size}"
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
        l1 = within("l1", at(self.l1[number], self.steps), 0.0)
        std = self.heat.std(pool.lr, l1, self.steps)
        if not self._begun[number]:
            self._signs[number] = position_signs(pool, weight.rows, weight.cols, self.seed)
            self._begun[number] = True
        active, sign = weight.rows >= 0, self._signs[number].to(dormant.dtype)
        theta = sign * weight.values.detach().to(dormant.dtype) - pool.lr * l1
        if std:
            add_normal_(theta, std, self.seed, self.steps, pool.stream(Purpose.NOISE))
            add_normal_(dormant, std, self.seed, self.steps, pool.stream(Purpose.GROW))
        self._bound(dormant, low)
        position = weight.rows.long() * weight.matrix_shape[1] + weight.cols.long()
        # Entries of active connections mean nothing; theta_min is where one starts that is dropped
        # from outside.
        dormant[position[active]] = low
        grown = (dormant >= 0).nonzero().flatten()
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
        if self.theta_min is not None:
            return within("theta_min", at(self.theta_min[pool.number], step), -_HUGE, -_TINY)
        assert self.p_min is not None
        share = within("p_min", at(self.p_min[pool.number], step), _TINY, _BELOW_ONE)
        l1 = within("l1", at(self.l1[pool.number], step), 0.0)
        if not l1:
            raise ValueError(
                f"p_min sets theta_min = -T (1 - p_min) / (l1 p_min), and l1 of {pool.name} is 0 "
                f"(step {step}): keep "
                "l1 above 0, or give theta_min="
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

    def _settings(self) -> dict[str, Any]:
        return {"boundary": self.boundary, "start": self.start}

    def _state(self) -> dict[str, Any]:
        return {
            "dormant": {p.name: d.clone() for p, d in zip(self.pools, self._dormant, strict=True)},
            "begun": list(self._begun),
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        loaded = []
        for pool, mine in zip(self.pools, self._dormant, strict=True):
            theirs = state["dormant"][pool.name]
            if theirs.shape != mine.shape:
                raise ValueError(
                    f"this is the state of a model where {pool.name} has {theirs.numel()} "
                    "potential connections, "
                    f"not {mine.numel()}"
                )
            loaded.append(theirs.to(mine, copy=True))
        begun = [bool(b) for b in state["begun"]]
        self._dormant, self._begun = loaded, begun
        self._signs.read()

"""Top-KAST: always sparse, with a larger set of connections that learn than of those that take
part.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire import random, topology
from rewire.distributed import sum_over_ranks
from rewire.methods.core.base import Method, Moments, Pool, Purpose
from rewire.methods.core.parameters import NonNegative, Steps, moments_field, service, setting
from rewire.methods.core.registry import register
from rewire.methods.core.state import copied
from rewire.methods.core.updates import Timing, fill_in
from rewire.methods.criteria.topk import recorded
from rewire.topology import Index

__all__ = ["TopKAST"]


@register(
    name="top-kast",
    paper="Jayakumar, Pascanu, Rae, Osindero, Elsen, NeurIPS 2020 (arXiv 2106.03517)",
    summary="the K largest weights take part, the next largest learn as well, without effect "
    "until they are among them",
    guarantees=(
        "K exact in every layer at every moment, forward and backward",
        "a connection that leaves keeps its value and may come back with it",
    ),
    memory="O(M)",
    needs="gradients",
)
class TopKAST(Method):
    """Of a dense theta, kept by the method, two sets are chosen in each layer every ``every``
    steps::

        A = the K largest |theta|               the pool: forward, and the gradients of activations
        B = the K (1 + explore) largest |theta| contains A: these theta are trained

    Connections of A are the pool's, trained by your optimizer. Those of B \\ A are trained by one
    of the same kind and settings that the method keeps, with the loss gradient at their positions,
    computed from what the layer captured (nothing of them is in the forward pass, so its cost is
    that of A). Everything else rests. The exploration penalty shrinks what is trained, B \\ A more
    (D = K / M)::

        theta <- theta - eta l2 theta   on A,        theta <- theta - eta (l2 / D) theta   on B \\ A

    It is decoupled from the optimizer (in plain SGD the same as in the loss). Gradients of B \\ A
    are brought to the scale of the optimizer's, whatever a GradScaler, clipping or DDP's average
    made of those.

    The model cannot be compiled while it trains (captured gradients need eager mode). theta outside
    of the first topology starts as random numbers of the scale of the values there are; the first
    choice is made after one step.

    Cost: a step costs what the layer does, and one more value gradient for B \\ A; a choice sorts M
    numbers. Memory:
    M values per layer, and optimizer state for B.
    """

    explore: NonNegative = setting(
        default=1.0, help="size of B \\ A as a multiple of K; 1 is the paper's usual B = 2 A"
    )
    l2: NonNegative = setting(
        default=1e-4,
        help="coefficient of the exploration penalty; eta l2 / D must stay below 1 to be sensible",
    )
    every: Steps | None = setting(
        default=None,
        help="optimizer steps between choices of the sets; by default 100, or as often as 10 "
        "choices need in a short training",
    )
    until: Steps | None = setting(
        default=None,
        low=0,
        help="no other choice after this many steps (the topology then stays, and exploring ends); "
        "by default three quarters of a training of known length, else there is no end",
    )
    moments: Moments = moments_field()
    total_steps: Steps | None = service(default=None, help="optimizer steps of the whole training")

    needs_room = True
    keeps_prior = True

    def _check(self) -> None:
        given = Timing(every=self.every, until=self.until)
        timing = fill_in(given, Timing(every=100), self.total_steps, None)
        self.every, self.until = timing.every, timing.until

    def _setup(self) -> None:
        self._theta = [self._initial(pool) for pool in self.pools]
        self._exploring = [_Exploring(pool) for pool in self.pools]

    def _initial(self, pool: Pool) -> Tensor:
        """theta of all M positions: random at the scale of the values there are (theirs are in the
        pool).
        """
        weight = pool.weight
        values = weight.values.detach()[weight.active()]
        scale = float(values.square().mean().sqrt()) or weight.matrix_shape[1] ** -0.5
        drawn = random.normal(self.seed, 0, pool.stream(Purpose.VALUE), weight.size, weight.device)
        return (scale * drawn).to(weight.dtype)

    # --- the step ---------------------------------------------------------------------------------

    def _wants_capture(self, step: int) -> bool:
        return self._is_exploring(step)

    def _schedule(self) -> str | None:
        return f"every={self.every}, until={self.until} steps"

    def _is_exploring(self, step: int) -> bool:
        return self.until is None or step <= self.until

    def _after_step(self, pools: list[Pool]) -> None:
        for pool in pools:
            values = pool.weight.values
            if self._is_exploring(self.steps):
                self._exploring[pool.number].step(self.l2 / pool.weight.density)
            values.mul_(1.0 - pool.lr * self.l2)
        if self._is_exploring(self.steps) and (
            self.steps == 1 or self.steps % (self.every or 1) == 0
        ):
            for pool in self._trained():
                self._choose(pool)
            self.updates += 1

    def _choose(self, pool: Pool) -> None:
        """Take the largest theta into the pool, the next largest into the exploring set."""
        weight, theta = pool.weight, self._theta[pool.number]
        exploring = self._exploring[pool.number]
        k, cols = weight.connections, weight.matrix_shape[1]
        slots = weight.active()
        mine = pool.keys(slots)
        theta[mine] = weight.values.detach()[slots]
        theta[exploring.at] = exploring.values.detach()
        order = torch.sort(self._sizes(pool, theta), descending=True, stable=True).indices
        chosen = order[:k]
        leaving = ~torch.isin(mine, chosen)
        entering = torch.sort(chosen[~torch.isin(chosen, mine)]).values
        self._exchange(pool, slots[leaving], entering // cols, entering % cols, theta[entering])
        end = min(k + round(self.explore * k), weight.positions)
        exploring.begin(torch.sort(order[k:end]).values, theta)

    def _sizes(self, pool: Pool, theta: Tensor) -> Tensor:
        """|theta|; what is not allowed comes last, what is frozen first."""
        sizes, prior = theta.abs(), pool.weight.prior
        if pool.allowed is not None:
            inside = sizes[pool.allowed.keys]
            sizes = torch.full_like(sizes, -1.0)
            sizes[pool.allowed.keys] = inside
        if prior is not None and prior.frozen is not None:
            sizes[prior.frozen] = torch.inf
        return sizes

    # --- state ------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        names = [pool.name for pool in self.pools]
        return {
            "theta": copied(dict(zip(names, self._theta, strict=True))),
            "exploring": {n: e.state() for n, e in zip(names, self._exploring, strict=True)},
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        theta = [state["theta"][p.name].to(p.weight.values.detach(), copy=True) for p in self.pools]
        exploring = [_Exploring(pool) for pool in self.pools]
        for pool, own in zip(self.pools, exploring, strict=True):
            own.load(state["exploring"][pool.name])
        self._theta, self._exploring = theta, exploring


class _Exploring:
    """Positions of one pool that learn without taking part: their values and an optimizer like the
    pool's.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.at = torch.empty(0, dtype=torch.int64, device=pool.weight.device)
        self.values = nn.Parameter(
            torch.empty(0, dtype=pool.weight.dtype, device=pool.weight.device)
        )
        self.optimizer = self._like(pool.optimizer)
        self._index: Index | None = None  # of `at`, in slots 0, 1, ...

    def _like(self, optimizer: Optimizer) -> Optimizer:
        kind = type(optimizer)
        accepted = inspect.signature(kind.__init__).parameters
        try:
            return kind(
                [self.values], **{k: v for k, v in optimizer.defaults.items() if k in accepted}
            )
        except TypeError as error:
            raise ValueError(
                f"top-kast needs a second optimizer like yours, and {kind.__name__} cannot be made "
                f"from its defaults ({error}): use one of torch.optim"
            ) from None

    def begin(self, at: Tensor, theta: Tensor) -> None:
        """Explore the positions ``at`` (ascending), from their ``theta``; optimizer state starts
        afresh.
        """
        self.at, self._index = at, None
        self.values = nn.Parameter(theta[at].clone())
        self.optimizer = self._like(self.pool.optimizer)

    def step(self, decay: float) -> None:
        """One optimizer step along the loss gradient, and the penalty."""
        if not self.at.numel() or self.pool.recorder is None:  # frozen when the step was asked for
            return
        weight, record = self.pool.weight, recorded(self.pool)
        if self._index is None:
            cols = weight.matrix_shape[1]
            self._index = topology.build_index(
                self.at // cols, self.at % cols, *weight.matrix_shape
            )
        parts = [pair.at(self._index, self.at.numel()) for pair in record.pairs]
        own = torch.stack(parts).sum(0) if parts else torch.zeros_like(self.values)
        self.values.grad = (sum_over_ranks(weight, own) * record.scale()).to(weight.dtype)
        for name, value in self.pool.group.items():
            if name != "params":
                self.optimizer.param_groups[0][name] = value
        self.optimizer.param_groups[0]["lr"] = self.pool.lr
        self.optimizer.step()
        with torch.no_grad():
            self.values.mul_(max(1.0 - self.pool.lr * decay, 0.0))

    def state(self) -> dict[str, Any]:
        kept = self.optimizer.state.get(self.values, {})
        return dict(copied({"at": self.at, "values": self.values, "optimizer": kept}))

    def load(self, state: Mapping[str, Any]) -> None:
        like = self.pool.weight.values.detach()
        self.at, self._index = state["at"].to(like.device, copy=True), None
        self.values = nn.Parameter(state["values"].to(like, copy=True))
        self.optimizer = self._like(self.pool.optimizer)
        # Numbers such as Adam's count stay where the optimizer has them.
        kept = {
            k: v.to(like.device if v.dim() else v.device, copy=True) if isinstance(v, Tensor) else v
            for k, v in state["optimizer"].items()
        }
        if kept:
            self.optimizer.state[self.values] = kept

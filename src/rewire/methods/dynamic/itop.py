"""ITOP: in-time over-parameterization."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.methods.core.base import Moments, Pool
from rewire.methods.core.registry import register
from rewire.methods.core.settings import choice
from rewire.methods.core.updates import in_steps
from rewire.methods.criteria.drop import Magnitude
from rewire.methods.criteria.gradients import CandidateCount
from rewire.methods.criteria.grow import Gradient, Random
from rewire.methods.dynamic.rewirer import Rewirer
from rewire.schedules import Schedule

__all__ = ["ITOP"]


@register(
    name="itop",
    paper="Liu et al., ICML 2021 (arXiv 2102.02887)",
    summary="SET or RigL with rare updates and constant exploration, so that most positions are "
    "active at some time",
    keeps_budget="every step",
    guarantees=(
        "K exact in every layer at every moment",
        "the share of positions ever active is exact",
    ),
    memory="O(M)",
    needs="gradients",
)
class ITOP(Rewirer):
    """Every ``every`` steps, to the end and with a constant share, in each layer::

        drop  the floor(fraction K) smallest |w|
        grow  as many at random (SET) or where |dL/dw| is largest (RigL)

    ``explored()`` (also in `stats`) is R_s, the share of all positions that have ever been active,
    overall.

    Args:
        grow: "gradient" (RigL-ITOP) or "random" (SET-ITOP).
        fraction: share to replace; a float or a schedule over steps.
        every: steps between updates; by default the authors' 4000 (gradient) or 1500 (random),
            long, so that new connections have time to become useful; or in a training of known
            length as often as 10 updates need.
        until: no update after this many steps; by default three quarters of a training of known
            length, else, as in the paper, never stopping.
        candidates: see `rewire.methods.criteria.grow.Gradient`.
        track: count R_s. It keeps the positions ever active, 8 bytes each: K at the start, M in the
            end at most, whence O(M); without it memory is O(K).
        steps: of the whole training; `rewire train` gives it.

    Cost per update: O(M samples) (gradient, exact) or O(K log K), and O(positions ever active).
    """

    keeps_limits: ClassVar[tuple[str, ...]] = ("fan-in", "fan-out", "block")

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        grow: Literal["gradient", "random"] = "gradient",
        fraction: float | Schedule = 0.5,
        every: int | None = None,
        until: int | None = None,
        candidates: CandidateCount = "auto",
        track: bool = True,
        moments: Moments = "auto",
        steps: int | None = None,
        seed: int | None = None,
    ) -> None:
        choice("grow", grow, ("gradient", "random"))
        every, until = in_steps(every, until, 4000 if grow == "gradient" else 1500, steps)
        super().__init__(
            model,
            optimizer,
            drop=Magnitude(),
            grow=Gradient(candidates) if grow == "gradient" else Random(),
            fraction=fraction,
            every=every,
            until=until,
            moments=moments,
            seed=seed,
        )
        self.track = track
        # sorted keys; begun at the first step, when the model is surely loaded
        self._ever: dict[str, Tensor] = {}

    def _after_step(self, pools: list[Pool]) -> None:
        if self.track:
            for pool in self.pools:
                if pool.name not in self._ever:
                    self._ever[pool.name] = _keys(pool, pool.weight.active())
        super()._after_step(pools)

    def _exchange(
        self, pool: Pool, slots: Tensor, rows: Tensor, cols: Tensor, values: Tensor | float = 0.0
    ) -> Tensor:
        grown = super()._exchange(pool, slots, rows, cols, values)
        if self.track:
            self._ever[pool.name] = torch.cat([self._ever[pool.name], _keys(pool, grown)]).unique()
        return grown

    def explored(self) -> float:
        """R_s: positions that have ever been active, over all positions."""
        total = sum(pool.weight.size for pool in self.pools)
        ever = [
            self._ever[p.name].numel() if p.name in self._ever else p.weight.connections
            for p in self.pools
        ]
        return sum(ever) / total

    def stats(self) -> dict[str, Any]:
        return super().stats() | ({"explored": self.explored()} if self.track else {})

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"track": self.track, "grow": type(self.grow).__name__}

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"ever": dict(self._ever)}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        devices = {pool.name: pool.weight.device for pool in self.pools}
        ever = {name: keys.to(devices[name], copy=True) for name, keys in state["ever"].items()}
        super()._load_state(state)
        self._ever = ever


def _keys(pool: Pool, slots: Tensor) -> Tensor:
    weight = pool.weight
    return weight.rows[slots].long() * weight.matrix_shape[1] + weight.cols[slots].long()

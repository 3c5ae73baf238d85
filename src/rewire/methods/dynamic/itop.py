"""ITOP: in-time over-parameterization."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from rewire.methods.core.base import Pool
from rewire.methods.core.explored import EverActive
from rewire.methods.core.parameters import fraction_field, setting
from rewire.methods.core.registry import register
from rewire.methods.core.updates import Timing
from rewire.methods.criteria.drop import ByMagnitude
from rewire.methods.criteria.gradients import CandidateCount, candidates_field
from rewire.methods.criteria.grow import ByGradient, Random
from rewire.methods.dynamic.rewirer import Rewiring
from rewire.schedules import Schedule

__all__ = ["ITOP"]


@register(
    name="itop",
    paper="Liu et al., ICML 2021 (arXiv 2102.02887)",
    summary="SET or RigL with rare updates and constant exploration, so that most positions are "
    "active at some time",
    guarantees=(
        "K exact in every layer at every moment",
        "the share of positions ever active is exact",
    ),
    memory="O(M)",
    needs="gradients",
)
class ITOP(Rewiring):
    """Every ``every`` steps (4000, or 1500 with random growth: long, so that new connections have
    time to become useful) and with a constant share, in each layer::

        drop  the floor(fraction K) smallest |w|
        grow  as many at random (SET) or where |dL/dw| is largest (RigL)

    ``explored()`` (also in `stats`) is R_s, the share of all positions that have ever been active,
    overall. The paper updates to the end of training.

    Cost per update: O(M samples) (gradient, exact) or O(K log K), and O(positions ever active).
    """

    growth: Literal["gradient", "random"] = setting(
        default="gradient", help="RigL-ITOP (gradient) or SET-ITOP (random)"
    )
    fraction: float | Schedule = fraction_field(0.5, "share to replace")
    candidates: CandidateCount = candidates_field()
    track: bool = setting(
        default=True,
        help="count R_s: it keeps the positions ever active, 8 bytes each (K at the start, M at "
        "most, whence O(M)); without it memory is O(K)",
    )

    keeps_limits = ("fan-in", "fan-out", "block")
    published = Timing(every=4000)
    drop = ByMagnitude()
    saves = ("_active.ever",)

    def _check(self) -> None:
        if self.growth == "random":
            self.published = Timing(every=1500)  # type: ignore[misc]  # of this one alone
        self.grow = ByGradient(self.candidates) if self.growth == "gradient" else Random()
        self._active = EverActive(self.track)  # begun at the first step: the model is loaded then
        super()._check()

    def _after_step(self, pools: list[Pool]) -> None:
        self._active.begin(self.pools)
        super()._after_step(pools)

    def _exchange(self, pool: Pool, *exchanged: Any) -> Tensor:
        grown = super()._exchange(pool, *exchanged)
        self._active.add(pool, grown)
        return grown

    def explored(self) -> float:
        """R_s: positions that have ever been active, over all positions."""
        return self._active.share(self.pools)

    def stats(self) -> dict[str, Any]:
        """As every method's; also "explored", R_s."""
        return super().stats() | self._active.stats(self.pools)

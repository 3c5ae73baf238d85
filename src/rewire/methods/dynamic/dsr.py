"""DSR: dynamic sparse reparameterization."""

from __future__ import annotations

from rewire.methods.core.parameters import Share, fraction_field, parameter
from rewire.methods.core.registry import register
from rewire.methods.core.updates import Timing
from rewire.methods.criteria.drop import BelowOneMagnitude
from rewire.methods.criteria.grow import Random
from rewire.methods.criteria.share import survivors
from rewire.methods.dynamic.rewirer import Rewiring
from rewire.schedules import Schedule

__all__ = ["DSR"]


@register(
    name="dsr",
    paper="Mostafa and Wang, ICML 2019 (arXiv 1902.05967)",
    summary="one adaptive threshold for all layers; random growth in proportion to survivors",
    guarantees=("K exact in total at every moment", "layers grow in proportion to their survivors"),
)
class DSR(Rewiring):
    """Every ``every`` steps, over all layers together::

        drop  |w| < H;  H doubles where fewer than (1 - tolerance) fraction K went,
                        halves where more than (1 + tolerance) fraction K went
        grow  as many at random, in layer l in proportion to the connections it has left

    The budget is kept in total and moves between layers: pools are enlarged as needed.

    Recalled from the paper, not read from its code. Cost: O(K log K) per update.
    """

    fraction: float | Schedule = fraction_field(
        0.05, "share of all connections to replace, the target of H"
    )
    magnitude: float = parameter(default=1e-3, low=1e-30, help="H at the start")
    tolerance: Share = parameter(
        default=0.1, help="relative distance from the target up to which H stays"
    )

    published = Timing(every=500)
    grow = Random()
    saves = ("threshold.magnitude",)

    def _check(self) -> None:
        super()._check()
        self.share = survivors
        self.drop = self.threshold = BelowOneMagnitude(float(self.magnitude), self.tolerance)

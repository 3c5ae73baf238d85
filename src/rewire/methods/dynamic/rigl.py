"""RigL: rigging the lottery."""

from __future__ import annotations

from typing import Literal

from rewire.methods.core.parameters import fraction_field, setting
from rewire.methods.core.registry import register
from rewire.methods.core.updates import Timing, decay
from rewire.methods.criteria.drop import ByMagnitude
from rewire.methods.criteria.gradients import CandidateCount, candidates_field
from rewire.methods.criteria.grow import ByGradient
from rewire.methods.dynamic.rewirer import Rewiring
from rewire.schedules import Schedule

__all__ = ["ByGradients", "RigL"]


class ByGradients(Rewiring):
    """What RigL and SRigL share: a share that falls along a cosine, the weakest go, and the largest
    gradients come.
    """

    fraction: float | Schedule = fraction_field(
        0.3, "alpha, the share to replace at the start; a schedule stays"
    )
    candidates: CandidateCount = candidates_field()

    published = Timing(every=100)
    drop = ByMagnitude()

    def _check(self) -> None:
        super()._check()
        self.fraction = decay(self.fraction, self.until_epochs or self.until)
        self.grow = ByGradient(self.candidates)


@register(
    name="rigl",
    paper="Evci et al., ICML 2020 (arXiv 1911.11134)",
    summary="every 100 steps, replace the weakest weights by the dormant connections with the "
    "largest gradients",
    guarantees=(
        "K exact in every layer at every moment",
        "exact growth equals a brute-force dense computation",
    ),
    needs="gradients",
)
class RigL(ByGradients):
    """Every ``every`` steps until T_end = ``until``, in each layer of K connections::

        n     floor(f K),  f(t) = fraction / 2 (1 + cos(pi t / T_end))
        drop  the n smallest |w|
        grow  the n largest |dL/dw| of this step among the positions that are not kept

    New values are 0, their optimizer state starts afresh. Without an end the fraction stays.

    Cost: exact O(M samples) time per update and O(K) memory besides the step's activations; sampled
    O(K samples).
    """

    regrown: Literal["new", "keep"] = setting(
        default="new",
        help="what is dropped and grows again starts at 0 (the paper), or has never gone (value "
        "and momentum stay, the authors' code)",
    )
    skip_step: bool = setting(
        default=True,
        help="a step that updates the topology moves no parameter of the optimizer, as in the "
        "paper's algorithm and code; False: it does both",
    )

    keeps_limits = ("fan-in", "fan-out", "block")

    def _setup(self) -> None:
        super()._setup()
        if self.skip_step:
            self._skip_steps(lambda method: method._updates_at(method.steps + 1))

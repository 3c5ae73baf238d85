"""MEST: memory-economic sparse training."""

from __future__ import annotations

from rewire.methods.core.parameters import NonNegative, Share, parameter, setting
from rewire.methods.core.registry import register
from rewire.methods.core.updates import Timing, fill_in
from rewire.methods.criteria.drop import ByMagnitudeAndGradient
from rewire.methods.criteria.grow import Random
from rewire.methods.dynamic.margin import EPOCHS, MILESTONES, Margin, SoftlyBounded, two_times
from rewire.schedules import Schedule

__all__ = ["MEST"]


@register(
    name="mest",
    paper="Yuan et al., NeurIPS 2021 (arXiv 2110.14032)",
    summary="every 5 epochs, drop by magnitude plus gradient and grow at random (EM), or with a "
    "soft bound (EM&S)",
    guarantees=(
        "K exact in every layer at every moment (EM)",
        "never above K (1 + margin), and K at the end (EM&S)",
    ),
)
class MEST(SoftlyBounded):
    """Every 5 epochs, in each layer, by the score |w| + gradient_weight |g| of the last step::

        EM     drop the floor(margin K) connections of lowest score, grow as many at random
        EM&S   drop all but the K of highest score, grow floor(margin K) at random:
               between updates K (1 + margin) exist

    New values are 0. Where the margin is 0, EM rests and EM&S returns to K for good; after
    ``until`` it does so in finalize.

    The score's form is recalled from the paper. Cost: O(K log K) per update.
    """

    margin: Share | Schedule = parameter(
        default=0.2,
        help="a number that is halved and then 0 at the milestones, or a schedule of your own",
    )
    milestones: tuple[int, int] | None = parameter(
        default=None,
        check=two_times,
        help="epochs of these two changes; by default the authors' 90 and 120 of 160 epochs, in a "
        "training of known length the same shares of it",
    )
    gradient_weight: NonNegative = setting(
        default=1.0, help="lambda, of the gradient's magnitude in the score; 0 is the authors' code"
    )
    published = Timing(every_epochs=5)
    grow = Random()

    def _check(self) -> None:
        given = self._timing()
        free = given == Timing() and self.milestones is None and not callable(self.margin)
        milestones = self.milestones or MILESTONES
        if free and self.total_steps is not None and self.total_epochs is not None:
            # All in steps, so that a training of few epochs has as many updates.
            first, second = (round(self.total_steps * m / EPOCHS) for m in MILESTONES)
            milestones = first, second
            usual = Timing(every=max(5 * self.total_steps // self.total_epochs, 1))
            every = fill_in(given, usual, self.total_steps, None).every
            self.every, self.until = every, None  # the milestones end the updates
        else:
            timing = fill_in(given, self.published, None, None)
            self.every, self.every_epochs, self.until, self.until_epochs = timing
        self.fraction = self.margin if callable(self.margin) else Margin(self.margin, milestones)
        self.drop = ByMagnitudeAndGradient(self.gradient_weight)

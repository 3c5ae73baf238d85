"""Budgets that come down along a cubic: what GMP and GraNet share."""

from __future__ import annotations

from rewire.methods.core.base import Pool
from rewire.methods.core.parameters import Steps, service, setting
from rewire.methods.core.updates import Timing, fill_in
from rewire.methods.pruning.shrink import Shrinking
from rewire.schedules import Cubic

__all__ = ["Gradual"]


class Gradual(Shrinking):
    """What GMP and GraNet share: budgets that come down along Zhu and Gupta's cubic, cut every so
    many steps.
    """

    every: Steps | None = setting(
        default=None,
        help="optimizer steps between cuts; by default {every}, or as often as 10 cuts need in a "
        "short training",
    )
    begin: Steps = setting(default=0, low=0, help="step of the first cut")
    until: Steps | None = setting(
        default=None, help="step of the last cut; by default half of a training of known length"
    )
    total_steps: Steps | None = service(default=None, help="optimizer steps of the whole training")

    #: Steps between cuts, as published.
    published = 100
    saves = ("_start",)

    @classmethod
    def words(cls) -> dict[str, object]:
        """What the help of ``every`` says of the class's own timing."""
        return {"every": cls.published}

    def _check(self) -> None:
        timing = fill_in(
            Timing(every=self.every, until=self.until),
            Timing(every=self.published),
            self.total_steps,
            None,
            last=0.5,
            begin=self.begin,
        )
        self.every = timing.every
        if timing.until is None:
            raise ValueError(
                "until, the step of the last cut, must be given where total_steps= of the training "
                "are not"
            )
        if timing.until <= self.begin:
            raise ValueError(
                f"until must be a whole number of steps of at least begin + 1 = {self.begin + 1}, "
                f"not {timing.until}"
            )
        self.until = self._end = timing.until

    def _setup(self) -> None:
        super()._setup()
        self._start = [pool.weight.connections for pool in self.pools]

    def targets(self, step: int) -> list[int]:
        """Connections of each pool at ``step``: K_f + (K_0 - K_f) (1 - (t - begin) / (until -
        begin))^3, rounded.
        """
        assert self.final is not None
        if step >= self._end:
            return list(self.final)
        length = self._end - self.begin
        pairs = zip(self._start, self.final, strict=True)
        return [
            final + round(Cubic(start - final, 0.0, length, self.begin)(step))
            for start, final in pairs
        ]

    def _schedule(self) -> str | None:
        return f"begin={self.begin}, every={self.every}, until={self.until} steps"

    def _cuts_at(self, step: int) -> bool:
        return self.begin <= step <= self._end and (
            step == self._end or (step - self.begin) % (self.every or 1) == 0
        )

    def _after_step(self, pools: list[Pool]) -> None:
        if self._cuts_at(self.steps):
            self._cut(self.targets(self.steps))

"""GMP whose cuts lie in the middle half of the training's compute."""

from rewire.methods.core.registry import register
from rewire.methods.pruning.gmp import GMP


@register(
    name="gmp-mid",
    paper="Jin et al., ICLR 2025 (arXiv 2501.12486); the cuts are GMP's",
    summary="gradual magnitude pruning between 25 % and 75 % of the training's compute",
)
class GMPMid(GMP):
    """`GMP` from a quarter to three quarters of the compute, counted as connections times steps;
    known where ``total_steps`` is. ``begin`` or ``until`` choose otherwise.
    """

    def _setup(self) -> None:
        free = self.begin == 0 and self.until == (self.total_steps or 0) // 2
        super()._setup()
        if free and self.total_steps is not None:
            left = sum(self.final or ()) / sum(self._start)
            compute = 1 / (0.25 + 0.5 / (left + (1 - left) / 4) + 0.25 / left)  # cubic in between
            self.begin = int(self.total_steps * compute / 4)
            self.until = self._end = max(int(self.total_steps * (1 - compute / (4 * left))), 1)
            self.every = min(self.every or 1, max((self._end - self.begin) // 10, 1))

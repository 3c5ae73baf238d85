"""The temperature of a random walk over connections, in each of the conventions in use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rewire.schedules import Schedule, at, checked, within

__all__ = ["Heat"]


@dataclass(frozen=True)
class Heat:
    """Temperature T, from ``noise`` (its standard deviation over eta; T = eta noise^2 / 2) or
    ``temperature`` (T itself, or "tied": T = eta l1^2 / 18, as in the paper's appendix, so that the
    noise of a step is a third of its L1).

    Raises ValueError where both are given or a number (a schedule's first) is not finite or below
    0.
    """

    noise: float | Schedule | None = None
    temperature: float | Schedule | Literal["tied"] | None = None

    def __post_init__(self) -> None:
        if self.noise is not None and self.temperature is not None:
            raise ValueError("give noise= or temperature=, not both: T = lr * noise**2 / 2")
        if isinstance(self.temperature, str):
            if self.temperature != "tied":
                raise ValueError(
                    "temperature must be a number of at least 0, a schedule or 'tied', not "
                    f"{self.temperature!r}"
                )
        elif self.temperature is not None:
            checked("temperature", self.temperature, 0.0)
        if self.noise is not None:
            checked("noise", self.noise, 0.0)

    @property
    def constant(self) -> bool:
        """Whether `std` depends on the learning rate and l1 alone."""
        return not callable(self.noise) and not callable(self.temperature)

    def std(self, lr: float, l1: float, step: int) -> float:
        """Standard deviation sqrt(2 eta T) of the noise of a step of rate ``lr`` with the L1
        coefficient ``l1``.
        """
        if self.temperature == "tied":
            return lr * l1 / 3
        if self.temperature is None:
            return lr * within("noise", at(1e-5 if self.noise is None else self.noise, step), 0.0)
        assert not isinstance(self.temperature, str)
        return math.sqrt(2 * lr * within("temperature", at(self.temperature, step), 0.0))

    def at(self, lr: float, l1: float, step: int) -> float:
        """T itself."""
        return self.std(lr, l1, step) ** 2 / (2 * lr) if lr else 0.0

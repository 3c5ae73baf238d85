"""Numbers that change over time: pure functions of a step.

A parameter that may change over time takes a float or a schedule: any callable from a step (0, 1,
2, ...: the number of optimizer steps or epochs done, see the parameter) to a float. Schedules have
no state, so a resumed run gets the same numbers. They are frozen dataclasses: printable,
comparable, picklable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "RATES",
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "Linear",
    "Schedule",
    "Step",
    "at",
    "checked",
    "within",
]

#: Besides floats, what parameters accept that may change over time.
Schedule: TypeAlias = Callable[[int], float]
#: The learning rate that suits sparse networks, by optimizer; where neither the user nor the method
#: names one, trainings of `rewire train` and `rewire.sklearn` begin with it.
RATES = {"sgd": 0.5, "adam": 0.01, "adamw": 0.01, "rmsprop": 0.002}


def at(value: float | Schedule, step: int) -> float:
    """The value of a float or a schedule at ``step``."""
    return value(step) if callable(value) else value


def checked(
    name: str, value: float | Schedule, low: float, high: float = math.inf
) -> float | Schedule:
    """``value``, if it (or the first number of a schedule) is in [low, high]; else raises
    ValueError.
    """
    within(name, at(value, 0), low, high)
    return value


def within(name: str, number: float, low: float, high: float = math.inf) -> float:
    """``number``, if it is finite and in [low, high]; else raises ValueError with the limits."""
    if not (isinstance(number, (int, float)) and low <= number <= high) or math.isinf(number):
        limits = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be a finite number {limits}, not {number}")
    return number


class _OverSteps:
    """What ends after so many steps."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")


@dataclass(frozen=True)
class Constant:
    """Always the same number."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear(_OverSteps):
    """Linear from ``start`` at step 0 to ``end`` at step ``steps``; ``end`` from then on."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class Cosine(_OverSteps):
    """``end + (start - end) (1 + cos(pi t / steps)) / 2``; ``end`` from ``steps`` on (RigL, Evci et
    al. 2020).
    """

    start: float
    steps: int
    end: float = 0.0

    def __call__(self, step: int) -> float:
        t = min(step / self.steps, 1.0)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * t)) / 2


@dataclass(frozen=True)
class Cubic(_OverSteps):
    """``end + (start - end) (1 - t / steps)^3`` (gradual magnitude pruning, Zhu and Gupta 2017)."""

    start: float
    end: float
    steps: int
    begin: int = 0

    def __call__(self, step: int) -> float:
        t = min(max(step - self.begin, 0) / self.steps, 1.0)
        return self.end + (self.start - self.end) * (1 - t) ** 3


@dataclass(frozen=True)
class Exponential:
    """``start * factor ** step``, never below ``floor``."""

    start: float
    factor: float
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        return max(self.start * self.factor**step, self.floor)


@dataclass(frozen=True)
class Step:
    """``start``, multiplied by ``factor`` at each of the ``milestones`` reached."""

    start: float
    factor: float
    milestones: tuple[int, ...]

    def __call__(self, step: int) -> float:
        return self.start * self.factor ** sum(step >= m for m in self.milestones)

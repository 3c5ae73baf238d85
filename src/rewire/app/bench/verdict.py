"""Figures, the targets they are measured against, and whether they reach them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rewire.app.bench.timing import Ratio

Status = Literal["met", "missed", "in part", "not available", "no target"]


@dataclass(frozen=True)
class Figure:
    """A measured number, with its unit and target.

    Attributes:
        sense: ">=" or "<=" (to the target), or "" for a figure that is printed without one.
        value: None where it cannot be measured here; the note then says why.
        low, high: quartiles, where there are rounds.
        note: what else there is to say, such as the ratio of the best times.
    """

    name: str
    value: float | None
    unit: str = ""
    sense: Literal[">=", "<=", ""] = ""
    target: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a target or a value."""
        if self.target is None or self.value is None or not self.sense:
            return None
        return self.value >= self.target if self.sense == ">=" else self.value <= self.target

    @property
    def margin(self) -> float | None:
        """How many times better than the target (below 1: worse); None without a ratio."""
        if self.met is None or not self.target or not self.value:
            return None
        if min(self.target, self.value) < 0:
            return None
        return self.value / self.target if self.sense == ">=" else self.target / self.value

    def to_json(self) -> dict[str, Any]:
        """For the results file."""
        return vars(self) | {"met": self.met, "margin": self.margin}


#: What the function of a target gives: its figures, and data for the pictures.
Measured = tuple[list[Figure], dict[str, Any]]


def at_least(
    name: str, measured: float | Ratio, target: float, unit: str = "x", note: str = ""
) -> Figure:
    """A figure that must not be below ``target``."""
    return _figure(name, measured, unit, ">=", target, note)


def at_most(name: str, measured: float | Ratio, target: float, unit: str, note: str = "") -> Figure:
    """A figure that must not be above ``target``."""
    return _figure(name, measured, unit, "<=", target, note)


def info(name: str, measured: float | Ratio, unit: str = "x", note: str = "") -> Figure:
    """A figure without a target."""
    return _figure(name, measured, unit, "", None, note)


def missing(name: str, reason: str) -> Figure:
    """A figure that cannot be measured here."""
    return Figure(name, None, note=reason)


def _figure(name: str, measured: float | Ratio, unit: str, *aim: Any) -> Figure:
    """``aim``: sense, target, note."""
    sense, target, note = aim
    if not isinstance(measured, Ratio):
        return Figure(name, float(measured), unit, sense, target, note=note)
    best = f"best times {measured.of_best:.3g}, {measured.rounds} rounds"
    note = f"{note}; {best}" if note else best
    return Figure(name, measured.median, unit, sense, target, measured.low, measured.high, note)


@dataclass(frozen=True)
class TargetResult:
    """A target with its figures.

    Attributes:
        others: share of the machine that other processes took meanwhile; None if unknown.
    """

    name: str
    title: str
    figures: tuple[Figure, ...]
    status: Status
    reason: str = ""
    seconds: float = 0.0
    others: float | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For the results file."""
        return vars(self) | {"figures": [figure.to_json() for figure in self.figures]}


def judge(figures: Sequence[Figure]) -> Status:
    """The verdict; "in part": all targets are met, but a figure could not be measured."""
    verdicts = [f.met for f in figures if f.met is not None]
    if not verdicts:
        return "no target"
    if not all(verdicts):
        return "missed"
    return "in part" if any(f.value is None for f in figures) else "met"

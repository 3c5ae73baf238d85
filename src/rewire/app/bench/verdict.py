"""Figures, what they are measured against, and whether they reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rewire.app.bench.timing import Ratio

__all__ = ["BarResult", "Figure", "Status", "at_least", "at_most", "info", "judge", "missing"]

Status = Literal["met", "missed", "in part", "not available", "no bar"]


@dataclass(frozen=True)
class Figure:
    """A measured number, with its unit and bar.

    sense: ">=" or "<=" (to the bar), or "" for a figure that is printed without one.
    value: None where a part of the bar cannot be measured here; the note then says why.
    low, high: quartiles where there are rounds. note: what else there is to say, such as the ratio
        of the best times.
    """

    name: str
    value: float | None
    unit: str = ""
    sense: Literal[">=", "<=", ""] = ""
    bar: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None where there is none."""
        if self.bar is None or self.value is None or not self.sense:
            return None
        return self.value >= self.bar if self.sense == ">=" else self.value <= self.bar

    @property
    def margin(self) -> float | None:
        """How many times better than the bar (below 1: worse); None without a bar, or where it has
        no meaning.
        """
        if self.met is None or not self.bar or not self.value or self.bar < 0 or self.value < 0:
            return None
        return self.value / self.bar if self.sense == ">=" else self.bar / self.value

    def to_json(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "sense": self.sense,
            "bar": self.bar,
            "low": self.low,
            "high": self.high,
            "met": self.met,
            "note": self.note,
        }


def at_least(
    name: str, measured: float | Ratio, bar: float, unit: str = "x", note: str = ""
) -> Figure:
    """A figure that must not be below ``bar``."""
    return _figure(name, measured, unit, ">=", bar, note)


def at_most(name: str, measured: float | Ratio, bar: float, unit: str, note: str = "") -> Figure:
    """A figure that must not be above ``bar``."""
    return _figure(name, measured, unit, "<=", bar, note)


def info(name: str, measured: float | Ratio, unit: str = "x", note: str = "") -> Figure:
    """A figure without a bar."""
    return _figure(name, measured, unit, "", None, note)


def missing(name: str, reason: str) -> Figure:
    """A part of a bar that cannot be measured here."""
    return Figure(name, None, note=reason)


def _figure(
    name: str,
    measured: float | Ratio,
    unit: str,
    sense: Literal[">=", "<=", ""],
    bar: float | None,
    note: str,
) -> Figure:
    if not isinstance(measured, Ratio):
        return Figure(name, float(measured), unit, sense, bar, note=note)
    best = f"best times {measured.of_best:.3g}, {measured.rounds} rounds"
    return Figure(
        name,
        measured.median,
        unit,
        sense,
        bar,
        measured.low,
        measured.high,
        f"{note}; {best}" if note else best,
    )


@dataclass(frozen=True)
class BarResult:
    """A bar with its figures. others: share of the machine that other processes took meanwhile;
    None if unknown.
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
        return {
            "name": self.name,
            "title": self.title,
            "status": self.status,
            "reason": self.reason,
            "seconds": self.seconds,
            "others": self.others,
            "figures": [f.to_json() for f in self.figures],
            "data": self.data,
        }


def judge(figures: Sequence[Figure]) -> Status:
    """Met if every figure that has a bar reaches it, missed if one does not, in part if one could
    not be measured.
    """
    verdicts = [f.met for f in figures if f.met is not None]
    if not verdicts:
        return "no bar"
    if not all(verdicts):
        return "missed"
    return "in part" if any(f.value is None for f in figures) else "met"

"""Rows of a study: means over seeds, and whether a difference to the best is more than chance."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import TrialState

from rewire.app.studies.plan import Cell, Expectation, Plan
from rewire.app.studies.stages import Outlook

__all__ = ["Row", "Verdict", "check_claims", "make_rows", "paired_p"]

#: What is averaged over seeds, in a row.
NUMBERS = ("connections", "training_multiply_adds", "seconds", "peak_memory", "epochs")


@dataclass
class Row:
    """A cell of the plan with what its seeds reached; scores are shares, means None without runs.

    p: of a paired t-test over seeds against the best row at the same budget, data and network,
    adjusted for the number of rows by Holm's rule; None for the best, and where it cannot be told.
    """

    cell: Cell
    seeds: int
    scores: dict[int, float] = field(default_factory=dict)
    outcomes: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    tuned: dict[str, Any] = field(default_factory=dict)
    best: bool = False
    p: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean score."""
        return statistics.fmean(self.scores.values()) if self.scores else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (of a sample); None for fewer than two."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else None

    def number(self, name: str) -> float | None:
        """The mean of a measured number; None where some run lacks it."""
        values = [outcome.get(name) for outcome in self.outcomes.values()]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known and len(known) == len(values) else None

    @property
    def inference(self) -> float | None:
        """Milliseconds of a batch of the finished network, median over seeds."""
        values = [outcome["inference"]["ms"] for outcome in self.outcomes.values()]
        return statistics.median(values) if values else None

    @property
    def possible(self) -> int:
        """Potential connections."""
        return max((int(o["possible"]) for o in self.outcomes.values()), default=0)


def make_rows(plan: Plan, outlook: Outlook) -> list[Row]:
    """The rows of a plan's cells, in order, with the best of each budget marked."""
    rows = []
    for place, cell in enumerate(plan.cells()):
        row = Row(cell, len(plan.seeds), tuned=outlook.tuned.get(place, {}))
        if place in outlook.failed:
            row.failed.append(outlook.failed[place])
        for seed, trial in outlook.runs.get(place, {}).items():
            outcome = trial.user_attrs.get("outcome")
            if trial.state == TrialState.COMPLETE and outcome is not None:
                row.scores[seed], row.outcomes[seed] = outcome["score"], outcome
            elif trial.state == TrialState.FAIL:
                row.failed.append(str(trial.user_attrs.get("error", "its worker died each time")))
        rows.append(row)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.cell.density is not None and row.scores:
            key = (row.cell.data, row.cell.model, row.cell.density)
            groups.setdefault(key, []).append(row)
    for group in groups.values():
        _mark(group)
    return rows


def _mark(group: Sequence[Row]) -> None:
    """Find the best of rows that compare, and how sure it is that the others are worse."""
    best = max(group, key=lambda row: (len(row.scores) == row.seeds, row.mean or 0.0))
    best.best = len(group) > 1
    others = [(paired_p(best.scores, row.scores), row) for row in group if row is not best]
    known = sorted(((p, i) for i, (p, _) in enumerate(others) if p is not None))
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        others[i][1].p = largest


def paired_p(one: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """Two-sided p of the paired t-test over the seeds that both have; None for fewer than two."""
    from scipy import stats

    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 2:
        return None
    differences = [one[seed] - other[seed] for seed in seeds]
    if max(differences) - min(differences) < 1e-12:  # no spread: the test has no answer
        return 1.0 if abs(differences[0]) < 1e-12 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds: what was expected in words, what was found (in percent, or None)."""

    claim: str
    found: float | None
    bound: float

    @property
    def holds(self) -> bool | None:
        """None while it cannot be told."""
        return None if self.found is None else self.found >= self.bound


def check_claims(plan: Plan, rows: Sequence[Row]) -> list[Verdict]:
    """The plan's expectations, each over all data, networks and densities that it names."""
    return [Verdict(_words(claim), _found(claim, rows), claim.at_least) for claim in plan.expect]


def _words(claim: Expectation) -> str:
    if claim.claim:
        return claim.claim
    where = "" if claim.density is None else f" at {100 * claim.density:g} %"
    on = f" on {claim.data}" if claim.data else ""
    less = f" above {claim.above}" if claim.above else ""
    return f"{claim.method}{where}{on}{less} at least {claim.at_least:g}"


def _found(claim: Expectation, rows: Sequence[Row]) -> float | None:
    """The smallest number that the claim speaks of; None while one of them is missing."""
    found = []
    for row in rows:
        if row.cell.entry.label != claim.method or claim.data not in (None, row.cell.data):
            continue
        if claim.density not in (None, row.cell.density):
            continue
        if len(row.scores) < row.seeds:
            return None
        value = 100 * (row.mean or 0.0)
        if claim.above is not None:
            rival = _rival(claim.above, row, rows)
            if rival is None or rival.mean is None:
                return None
            value -= 100 * rival.mean
        found.append(value)
    return min(found) if found else None


def _rival(label: str, row: Row, rows: Sequence[Row]) -> Row | None:
    """The row that a row is compared with: at the same budget, or without one."""
    for other in rows:
        same = (other.cell.data, other.cell.model) == (row.cell.data, row.cell.model)
        same = same and other.cell.density in (row.cell.density, None)
        if same and other.cell.entry.label == label and len(other.scores) == other.seeds:
            return other
    return None

"""What `--tune` searches for each method: ranges that follow from what the method declares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from optuna.trial import Trial

from rewire.app.errors import StudyError
from rewire.app.studies.plan import Cell, Search, takes_density
from rewire.app.train import baselines
from rewire.app.train.config import (
    TrainConfig,
    did_you_mean,
    method_options,
    read_options,
    starts_dense,
)
from rewire.methods.core.parameters import Declaration, kinds_of

__all__ = ["Choice", "Range", "Space", "space_of"]

#: A parameter without bounds on both sides is searched from a default / SPREAD to default x SPREAD.
SPREAD = 10.0
#: Options of `rewire train` that are searched too, with the choices of those that are words.
INITS: list[Any] = ["auto", "dense"]
#: Parameters that are the budget, or on which what a method promises depends.
LEFT = frozenset({"density", "moments", "scope", "signs", "allotment", "candidates"})


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, whole ones if ``whole``."""

    low: float
    high: float
    log: bool
    whole: bool = False

    def suggest(self, trial: Trial, name: str) -> Any:
        """A value that the trial is given."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether the search can begin with ``value``."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def suggest(self, trial: Trial, name: str) -> Any:
        """A value that the trial is given."""
        return trial.suggest_categorical(name, list(self.values))

    def holds(self, value: Any) -> bool:
        """Whether the search can begin with ``value``."""
        return value in self.values


@dataclass(frozen=True)
class Space:
    """By name what is searched ("lr", "init", "set.fraction"), and where the search begins."""

    parts: Mapping[str, Range | Choice]
    start: Mapping[str, Any]

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Values for a trial."""
        return {name: part.suggest(trial, name) for name, part in self.parts.items()}


def options_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Found values as options of a run: ``set`` holds the method's own."""
    own = {n.removeprefix("set."): v for n, v in params.items() if n.startswith("set.")}
    rest = {name: value for name, value in params.items() if not name.startswith("set.")}
    return {**rest, **({"set": own} if own else {})}


def space_of(cell: Cell, config: Mapping[str, Any]) -> Space:
    """The space of a cell whose run without a search has the options ``config``.

    Rate and first values, and every hyper-parameter that is a number or a word; those that the plan
    sets stay as they are, and its ``search:`` replaces ranges. Raises `StudyError`.
    """
    entry = cell.entry
    parts: dict[str, Range | Choice] = {}
    start: dict[str, Any] = {}

    def add(name: str, part: Range | Choice | None, value: Any) -> None:
        if part is not None:
            parts[name] = part
            if part.holds(value):
                start[name] = value

    add("lr", _around(config["lr"], Declaration("", above=0), whole=False), config["lr"])
    sparse_start = takes_density(entry.method) and not starts_dense(entry.method)
    if sparse_start and config.get("init") in INITS:
        add("init", Choice(tuple(INITS)), config["init"])
    declared = baselines.info(entry.method).parameters()
    suited = method_options(read_options(config))
    for name, parameter in declared.items():
        if name in entry.set or name in LEFT:
            continue
        value = suited.get(name, parameter.default)
        add(f"set.{name}", _part(parameter.annotation, value, parameter.declared), value)
    for name, given in entry.search.items():
        field = name if name in ("lr", "init") or name not in declared else f"set.{name}"
        if field == name and name not in TrainConfig.model_fields:
            known = [*declared, *TrainConfig.model_fields]
            raise StudyError(
                f"search: {entry.method} has no parameter {name!r}{did_you_mean(name, known)}"
            )
        parts.pop(field, None)
        start.pop(field, None)
        value = suited.get(name) if field != name else config.get(name)
        add(field, _given(name, given), value)
    return Space(parts, start)


def _part(annotation: Any, value: Any, declared: Declaration) -> Range | Choice | None:
    """What is searched of a parameter whose usual value is ``value``; None for what has no range.

    Counts of steps and epochs stay as they are: a method finds them from the length of the run.
    """
    if declared.unit:
        return None
    kinds = kinds_of(annotation)
    if isinstance(value, bool):
        return Choice((True, False))
    if isinstance(value, int | float) and (int in kinds or float in kinds):
        return _around(value, declared, whole=float not in kinds)
    words = [w for kind in kinds if get_origin(kind) is Literal for w in get_args(kind)]
    if isinstance(value, str) and len(words) > 1:
        return Choice(tuple(words))
    return None


def _around(value: float, declared: Declaration, *, whole: bool) -> Range | None:
    """A range around a usual value, within the bounds that are declared."""
    low, high = max(declared.low, declared.above), min(declared.high, declared.below)
    if value <= 0:
        return None  # what is off by default stays off
    bottom, top = value / SPREAD, value * SPREAD
    if math.isfinite(low) and math.isfinite(high) and not whole:  # a share
        bottom, top = max(low, value / 4), min(high, value * 4)
        edge = 1e-3 * (high - low)
        bottom, top = max(bottom, low + edge), min(top, high - edge)
        return Range(bottom, top, log=False) if bottom < top else None
    bottom, top = max(bottom, low if low > 0 else 0.0), min(top, high)
    if whole:
        bottom, top = max(1, math.ceil(bottom)), math.floor(top)
    return Range(bottom, top, log=True, whole=whole) if 0 < bottom < top else None


def _given(name: str, given: Search) -> Range | Choice:
    """A range or choices as the plan has them."""
    if isinstance(given, tuple):
        low, high = given
        if not low < high:
            raise StudyError(f"search: {name} has the range {low:g} to {high:g}, which is empty")
        whole = all(isinstance(end, int) for end in given)
        return Range(low, high, log=low > 0 and high / low >= 10, whole=whole)
    if not given:
        raise StudyError(f"search: {name} has no choices")
    return Choice(tuple(given))

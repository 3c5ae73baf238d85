"""What is to be run next: pilots, then the search, then the runs over seeds, cell by cell.

All of it follows from the plan and from what has ended, so every process comes to the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from rewire.app.errors import StudyError
from rewire.app.studies.plan import Cell, Plan, Run
from rewire.app.studies.search import Space, options_of, space_of
from rewire.app.studies.store import Ledger, Store, Task, is_ended
from rewire.app.train import baselines

__all__ = ["Outlook", "Stages", "Work"]


@dataclass(frozen=True)
class Work:
    """A run that is claimed: train it, then tell ``ledger`` what came of ``trial``."""

    run: Run
    ledger: Ledger
    trial: Trial


@dataclass
class Outlook:
    """A study at one moment.

    runs: by cell (its place in the plan) and seed the trial of the run; failed: by cell what went
    wrong before its runs could be planned; waiting, running, ended: numbers of trials;
    planned: how many there will be in all, as far as is known.
    """

    runs: dict[int, dict[int, FrozenTrial]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    epochs: dict[int, int] = field(default_factory=dict)
    tuned: dict[int, dict[str, Any]] = field(default_factory=dict)
    trials: list[FrozenTrial] = field(default_factory=list)
    planned: int = 0

    def count(self, *states: TrialState) -> int:
        """Trials in one of these states."""
        return sum(trial.state in states for trial in self.trials)

    @property
    def ended(self) -> int:
        """Trials of which nothing more comes."""
        return sum(is_ended(trial) for trial in self.trials)

    @property
    def over(self) -> bool:
        """Whether everything has ended."""
        return self.ended >= self.planned


class Stages:
    """The stages of a plan, in the study called ``name``."""

    def __init__(self, plan: Plan, store: Store, name: str) -> None:
        self.plan, self.store, self.name = plan, store, name
        self.cells = plan.cells()
        self.main = store.ledger(name)
        self._searches: dict[int, tuple[Ledger, Space, Run]] = {}
        # keys that may be claimed now, by ledger
        self._open: list[tuple[Ledger, dict[str, Run | None], int]] = []

    def unknown(self) -> list[Cell]:
        """Cells that the study has no trial of."""
        names = ("label", "density", "data", "model")
        known = {tuple(t.user_attrs.get(n) for n in names) for t in self.main.standing().values()}
        return [c for c in self.cells if tuple(c.names[n] for n in names) not in known]

    # --- what is to be done -----------------------------------------------------------------------

    def look(self) -> Outlook:
        """Add what is missing and see where the study stands."""
        seen = Outlook()
        self._open = []
        epochs = self._matched(seen) if self.plan.match == "multiply-adds" else {}
        final: list[Run] = []
        places: list[tuple[int, int]] = []
        for place, cell in enumerate(self.cells):
            seen.planned += len(self.plan.seeds)
            if place in seen.failed:
                seen.planned -= len(self.plan.seeds)
                continue
            changed: dict[str, Any] = {}
            if self.plan.match == "multiply-adds":
                if place not in epochs:
                    seen.planned += self.plan.tune * cell.entry.tuned
                    continue
                changed["epochs"] = seen.epochs[place] = epochs[place]
            if self.plan.tune and cell.entry.tuned:
                seen.planned += self.plan.tune
                winner = self._tuned(place, cell, changed, seen)
                if winner is None:
                    continue
                seen.tuned[place] = dict(winner)
                changed |= options_of(winner)
            for seed in self.plan.seeds:
                final.append(self.plan.run(cell, "run", seed, **changed))
                places.append((place, seed))
        # seed by seed, so that a study that is stopped has something of every cell
        order = sorted(range(len(final)), key=lambda i: self.plan.seeds.index(places[i][1]))
        found = self._enter(self.main, [final[i] for i in order], seen)
        for run, (place, seed) in zip(final, places, strict=True):
            seen.runs.setdefault(place, {})[seed] = found[run.key]
        return seen

    def _enter(self, ledger: Ledger, runs: list[Run], seen: Outlook) -> dict[str, FrozenTrial]:
        tasks = [Task(run.key, _attributes(run)) for run in runs]
        found = ledger.add(tasks)
        self._open.append((ledger, {run.key: run for run in runs}, -1))
        seen.trials += [found[task.key] for task in tasks]
        return found

    def _matched(self, seen: Outlook) -> dict[int, int]:
        """By cell the epochs that take as many multiply-adds as the first method's in ``epochs``.

        What an epoch takes is measured in a pilot: one epoch where the number of connections stays
        the same, a whole run where it does not.
        """
        pilots = {}
        for place, cell in enumerate(self.cells):
            run = self.plan.run(cell, "pilot", self.plan.seeds[0])
            pilots[place] = run if _shrinks(cell.entry.method) else run.pilot_of(1)
        found = self._enter(self.main, list(pilots.values()), seen)
        seen.planned += len(pilots)
        each: dict[int, float] = {}
        for place, run in pilots.items():
            trial = found[run.key]
            outcome = trial.user_attrs.get("outcome")
            if trial.state == TrialState.FAIL:
                seen.failed[place] = _why(trial)
            elif outcome is not None and trial.state == TrialState.COMPLETE:
                if not outcome["training_multiply_adds"]:
                    raise StudyError(f"--match: the multiply-adds of {run.cell} are not known")
                each[place] = outcome["training_multiply_adds"] / outcome["epochs"]
        epochs = {}
        for place, run in pilots.items():
            first = self._reference(run.cell)
            if first in seen.failed and place not in seen.failed:
                seen.failed[place] = f"the pilot of {self.cells[first]} failed"
            if place in each and first in each:
                whole = self.plan.run(run.cell, "run", self.plan.seeds[0]).values["epochs"]
                epochs[place] = max(1, round(whole * each[first] / each[place]))
        return epochs

    def _reference(self, cell: Cell) -> int:
        """The first method's cell at the same budget (or its only one), on the same data."""
        first = self.plan.methods[0]
        for place, other in enumerate(self.cells):
            alike = (other.data, other.model) == (cell.data, cell.model)
            if alike and other.entry == first and other.density in (cell.density, None):
                return place
        if cell.density is None:  # a dense network beside sparse ones: by the largest budget
            places = [p for p, c in enumerate(self.cells) if c.entry == first]
            return next(
                p
                for p in reversed(places)
                if (self.cells[p].data, self.cells[p].model) == (cell.data, cell.model)
            )
        raise StudyError(f"--match: {first.label} comes first and has no density {cell.density:g}")

    # --- the search -------------------------------------------------------------------------------

    def _tuned(
        self, place: int, cell: Cell, changed: Mapping[str, Any], seen: Outlook
    ) -> Mapping[str, Any] | None:
        """The values that the search of a cell found; None while it goes on."""
        ledger, space, base = self._search(place, cell, changed)
        keys = {f"{base.key} trial {number}": None for number in range(self.plan.tune)}
        tasks = [
            # the first trial has the values that there would be without a search
            Task(key, _attributes(base) | {"slot": i}, space.start if i == 0 else None)
            for i, key in enumerate(keys)
        ]
        found = ledger.add(tasks)
        self._open.append((ledger, dict(keys), place))
        trials = [found[key] for key in keys]
        seen.trials += trials
        if not all(map(is_ended, trials)):
            return None
        complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
        if not complete:
            seen.failed[place] = f"no trial of the search ended well: {_why(trials[0])}"
            seen.planned -= len(self.plan.seeds)
            return None
        best = max(complete, key=lambda trial: (trial.value or 0.0, -trial.number))
        return best.params

    def _search(
        self, place: int, cell: Cell, changed: Mapping[str, Any]
    ) -> tuple[Ledger, Space, Run]:
        if place in self._searches:
            return self._searches[place]
        # a seed of its own, and so another validation split: the runs are on fresh ones
        base = self.plan.run(cell, "tune", max(self.plan.seeds) + 1, **changed)
        if not base.values["validation"]:
            raise StudyError("--tune: decides by validation samples, so --validation must not be 0")
        space = space_of(cell, base.values)
        what = json.dumps([base.key, self.plan.tune, repr(space)])
        digest = hashlib.sha256(what.encode()).hexdigest()
        epochs = int(base.values["epochs"])
        ledger = self.store.ledger(
            f"{self.name}/tune/{cell}/{digest[:8]}",
            sampler=functools.partial(_sampler, int(digest[:7], 16)),
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=min(4, self.plan.tune), n_warmup_steps=max(1, epochs // 4)
            ),
        )
        self._searches[place] = ledger, space, base
        return self._searches[place]

    # --- claiming ---------------------------------------------------------------------------------

    def claim(self) -> Work | None:
        """Take a run that waits; None if there is none now. `look` goes before."""
        for ledger, runs, place in reversed(self._open):
            trial = ledger.claim(runs)
            if trial is None:
                continue
            run = runs[trial.user_attrs["key"]]
            if run is not None:
                return Work(run, ledger, trial)
            _, space, base = self._searches[place]
            try:
                params = self.store.patiently(lambda s=space, t=trial: s.suggest(t))  # type: ignore[misc]
                changed = {"epochs": base.values["epochs"], **options_of(params)}
                run = self.plan.run(base.cell, "tune", base.seed, **changed)
            except StudyError as error:
                ledger.fail(trial, error=str(error))
                continue
            return Work(run, ledger, trial)
        return None


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar is experimental
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=8)


def _attributes(run: Run) -> dict[str, Any]:
    return {**run.cell.names, "stage": run.stage, "seed": run.seed, "options": dict(run.values)}


def _why(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get("error", "its worker died each time"))


def _shrinks(method: str) -> bool:
    """Whether the number of connections changes while the method trains."""
    entry = baselines.info(method)
    if method in baselines.BASELINES:
        return False
    return entry.cls.starts_dense or entry.start_density is not None

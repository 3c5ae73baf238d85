"""How far a study is, in lines and on a terminal as a bar, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from rewire.app.studies.plan import Run
from rewire.app.studies.stages import Outlook

__all__ = ["Shower", "duration", "seconds_left"]


def duration(seconds: float) -> str:
    """A time in words: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def seconds_left(outlook: Outlook, done: Mapping[int, float]) -> float | None:
    """Seconds until the study is over, at the pace of those who work on it now; None if unknown.

    A run takes as long as those of the same method, budget, data and network did, or as the nearest
    that there is something known of.
    """
    took: dict[tuple[Any, ...], list[float]] = {}
    for trial in outlook.trials:
        if trial.state == TrialState.COMPLETE and "wall" in trial.user_attrs:
            for level in _levels(trial):
                took.setdefault(level, []).append(trial.user_attrs["wall"])
    if not took:
        return None

    def expected(trial: FrozenTrial) -> float:
        times = next(took[level] for level in _levels(trial) if level in took)
        return sum(times) / len(times)

    left, at_once = 0.0, 0
    for trial in outlook.trials:
        if trial.state == TrialState.RUNNING:
            left += expected(trial) * (1 - done.get(trial._trial_id, 0.5))
            at_once += 1
        elif trial.state == TrialState.WAITING:
            left += expected(trial)
    # what is not planned yet is like the rest
    times = took[()]
    left += max(0, outlook.planned - len(outlook.trials)) * sum(times) / len(times)
    return left / max(at_once, len(done), 1)


def _levels(trial: FrozenTrial) -> list[tuple[Any, ...]]:
    """What runs are alike in, the nearest first."""
    a = trial.user_attrs
    names = [a.get(name) for name in ("stage", "data", "model", "method", "density")]
    return [tuple(names[:n]) for n in (5, 4, 3)] + [(None, *names[1:3]), ()]


class Shower:
    """Prints a line for every run that ends here; on a terminal there is a bar below."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        self.bar: Bar | None = None
        self.shown = 0.0
        if console.is_terminal and not quiet:
            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                console=console,
                transient=True,
                expand=True,
            )
            self.task = self.bar.add_task("runs", total=None, left="")
            self.bar.start()

    def say(self, line: str) -> None:
        """Something that the user has to know, on stderr."""
        self.errors.print(line)

    def stands(self, outlook: Outlook, done: Mapping[int, float]) -> None:
        """Move the bar."""
        if self.bar is None or time.monotonic() - self.shown < 0.5:
            return
        self.shown = time.monotonic()
        running = outlook.count(TrialState.RUNNING)
        self.bar.update(
            self.task,
            description=f"{running} runs under way" if running != 1 else "1 run under way",
            total=outlook.planned,
            completed=outlook.ended,
            left=_left(outlook, done),
        )

    def ended(self, run: Run, what: str, value: Any, seconds: float, outlook: Outlook) -> None:
        """Print how a run ended."""
        if what == "failed":
            self.say(f"{run.cell} seed {run.seed} failed: {value}")
        if self.quiet or what == "failed":
            return
        count = min(outlook.ended + (what != "stopped"), outlook.planned)
        stage = {"run": "", "pilot": "pilot ", "tune": "search "}[run.stage]
        if what == "pruned":
            told = "ended early, no better than others"
        elif what == "stopped":
            told = "stopped, goes on from its checkpoint"
        elif run.stage == "tune":
            told = f"validation {value['validation']:.2%}"
        else:
            told = f"test {value['score']:.2%}"
        self.console.print(
            f"{count}/{outlook.planned}  {stage}{run.cell} seed {run.seed}  {told}  "
            f"{seconds:.1f} s  {_left(outlook, {})}".rstrip()
        )

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _left(outlook: Outlook, done: Mapping[int, float]) -> str:
    left = seconds_left(outlook, done)
    return "" if left is None or outlook.over else f"about {duration(left)} left"

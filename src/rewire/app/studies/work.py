"""Works on a study: claims runs, trains each in its own process, and enters what came of it."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from rewire.app.cores import cores
from rewire.app.studies.plan import Run, folder_name
from rewire.app.studies.stages import Outlook, Stages, Work
from rewire.app.studies.store import BEAT

__all__ = ["Crew", "Watcher"]

#: Seconds between looks at what others did, while there is nothing to claim.
LOOK = 2.0
#: Seconds that a run is given to save and leave after it was told to.
LEAVE = 30.0


class Watcher(Protocol):
    """Is told how a study gets on."""

    def say(self, line: str) -> None:
        """Something that the user has to know."""

    def stands(self, outlook: Outlook, done: Mapping[int, float]) -> None:
        """Where the study stands; ``done`` has the share of each run that is trained here."""

    def ended(self, run: Run, what: str, value: Any, seconds: float, outlook: Outlook) -> None:
        """A run ended here: "done", "failed", "pruned" or "stopped"."""


@dataclass
class _Running:
    """A run that is trained here now."""

    work: Work
    process: BaseProcess
    connection: Connection
    begun: float
    done: float = 0.0
    epoch: int = 0
    value: float | None = None
    asked: str = ""
    answer: tuple[str, Any] | None = None
    told: set[int] = field(default_factory=set)


class Crew:
    """Trains what waits, ``jobs`` runs at a time, until nothing is left or it is stopped."""

    def __init__(
        self,
        stages: Stages,
        folder: Path,
        free: Mapping[str, Any],
        jobs: int,
        watcher: Watcher,
        stop: Callable[[], int],
    ) -> None:
        """``free`` are options that decide no number: where data lie, how often to save."""
        self.stages, self.folder, self.free = stages, folder, free
        self.jobs, self.watcher, self.stop = jobs, watcher, stop
        known = multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context(
            "forkserver" if "forkserver" in known else "spawn"
        )
        if "forkserver" in known:  # torch is imported once
            self.context.set_forkserver_preload(["rewire.app.studies.child"])
        self.running: dict[int, _Running] = {}
        self.beaten = 0.0
        self.outlook = Outlook()

    def work(self) -> Outlook:
        """Work until the study is over; returns where it stands. Raises KeyboardInterrupt."""
        warm = False
        try:
            while True:
                outlook = self.outlook = self.stages.look()
                if not (warm or outlook.over):
                    self._warm_up()
                    warm = True
                self._begin()
                if not self.running and outlook.over:
                    self.watcher.stands(outlook, {})
                    return outlook
                until = time.monotonic() + LOOK
                full = len(self.running) >= self.jobs
                while full or time.monotonic() < until:
                    if self._listen(outlook):
                        break
                    if self.stop():
                        raise KeyboardInterrupt
        finally:
            self._leave()

    def _warm_up(self) -> None:
        """Wait until processes begin at once: a run that is claimed must not wait without a beat
        for torch to be imported.
        """
        from rewire.app.studies import child

        process = self.context.Process(target=child.nothing)
        process.start()
        process.join()

    # --- runs -------------------------------------------------------------------------------------

    def _begin(self) -> None:
        while len(self.running) < self.jobs:
            work = self.stages.claim()
            if work is None:
                return
            ours, theirs = self.context.Pipe()
            folder = self.folder / folder_name(work.run.key)
            # few runs left: each may have more threads
            threads = max(1, cores() // self.jobs)
            values = {**work.run.values, **self.free}
            from rewire.app.studies import child

            process = self.context.Process(
                target=child.execute, args=(theirs, values, str(folder), threads), daemon=False
            )
            process.start()
            theirs.close()
            number = work.trial._trial_id
            self.running[number] = _Running(work, process, ours, time.monotonic())

    def _listen(self, outlook: Outlook) -> bool:
        """Hear what the runs say, for a moment at most; whether one of them ended."""
        by = {run.connection: run for run in self.running.values()}
        sentinels = {run.process.sentinel: run for run in self.running.values()}
        if not by:
            time.sleep(0.5)
        for one in wait([*by, *sentinels], timeout=0.5) if by else ():
            if isinstance(one, Connection):
                self._hear(by[one])
        self._beat()
        ended = [run for run in self.running.values() if not run.process.is_alive()]
        for run in ended:
            while run.answer is None and self._hear(run):
                pass
            self._end(run, outlook)
        share = {number: run.done for number, run in self.running.items()}
        self.watcher.stands(outlook, share)
        return bool(ended)

    def _hear(self, run: _Running) -> bool:
        """Take one message; False if there is none."""
        try:
            if run.answer is not None or not run.connection.poll():
                return False
            kind, value = run.connection.recv()
        except (EOFError, OSError):
            return False
        if kind == "progress":
            run.done = float(value)
        elif kind == "epoch":
            run.epoch, run.value = int(value[0]), value[1]
            self._report(run)
        else:
            run.answer = (kind, value)
        return True

    def _report(self, run: _Running) -> None:
        """Let the search see a trial's validation score, and end a bad one."""
        if run.work.run.stage != "tune" or run.value is None:
            return
        trial, store = run.work.trial, self.stages.store
        known = store.patiently(lambda: store.storage.get_trial(trial._trial_id))
        if run.epoch not in known.intermediate_values and not known.state.is_finished():
            store.patiently(lambda: trial.report(run.value or 0.0, run.epoch))
        last = run.epoch >= int(run.work.run.values["epochs"])
        if not last and store.patiently(trial.should_prune):
            self._ask(run, "prune")

    def _ask(self, run: _Running, what: str) -> None:
        if not run.asked:
            run.asked = what
            try:
                run.connection.send(what)
            except OSError:
                return

    def _beat(self) -> None:
        """Say that the runs are alive; leave those that others took for dead."""
        if time.monotonic() - self.beaten < BEAT:
            return
        for number, run in list(self.running.items()):
            run.work.ledger.beat(number)
            if not run.work.ledger.is_ours(run.work.trial):
                self._ask(run, "lost")
        self.beaten = time.monotonic()

    def _end(self, run: _Running, outlook: Outlook) -> None:
        """Enter how a run ended."""
        run.process.join()
        ledger, trial = run.work.ledger, run.work.trial
        del self.running[trial._trial_id]
        answer: tuple[str, Any] = run.answer or ("died", None)
        kind, value = answer
        seconds = time.monotonic() - run.begun
        if kind == "done":
            tuning = run.work.run.stage == "tune"
            ledger.note(trial, outcome=_brief(value) if tuning else value, wall=seconds)
            ledger.finish(trial, value["validation"] if tuning else value["score"])
        elif kind == "stopped" and value == "prune":
            kind = "pruned"
            ledger.note(trial, wall=seconds)
            ledger.finish(trial, run.value, pruned=True)
        elif kind == "stopped":
            ledger.fail(trial, stopped=True)
        elif kind == "failed":
            ledger.fail(trial, error=value)
        else:
            code = run.process.exitcode
            kind, value = "failed", f"its process ended with code {code}"
            if code is not None and code < 0:
                value = f"its process was ended by signal {-code}; it is run again"
            ledger.fail(trial, died=value)
        run.connection.close()
        self.watcher.ended(run.work.run, kind, value, seconds, outlook)

    def _leave(self) -> None:
        """Tell all runs to save and end, and give them back."""
        for run in self.running.values():
            self._ask(run, "stop")
        until = time.monotonic() + LEAVE
        for run in list(self.running.values()):
            while run.process.is_alive() and time.monotonic() < until:
                wait([run.connection, run.process.sentinel], timeout=0.2)
                while self._hear(run):
                    pass
            if run.process.is_alive():
                run.process.kill()
            while run.answer is None and self._hear(run):
                pass
            if run.answer is None:
                run.answer = ("stopped", "stop")
            self._end(run, self.outlook)


def _brief(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """What the table needs of a trial of the search; its test score is not even kept."""
    return {name: outcome[name] for name in ("validation", "seconds", "epochs")}

"""Where a study is kept: Optuna's tables in SQLite or PostgreSQL, shared by all who work on it.

Every run is a trial. What is to be done is the state of the trials, so no process is in charge:
each adds the trials that are missing, claims one that waits, beats while it trains, and ends it
with the outcome. What a process leaves undone when it dies is found by its last beat.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import exc

from rewire.app.errors import StudyError
from rewire.storage import reading

__all__ = ["FORMAT", "Ledger", "Store", "Task", "shown_url"]

#: Version of what the trials hold.
FORMAT = 1
#: Seconds between beats, and after how many without one a trial's worker counts as dead.
BEAT, GRACE = 5, 60
#: How often a run is begun at most, if its worker dies each time.
TRIES = 4

_T = TypeVar("_T")
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
_FATAL = (  # no waiting helps
    "authentication failed",
    "does not exist",
    "no password supplied",
    "not a database",
    "malformed",
    "readonly database",
    "unable to open database file",
    "permission denied",
    "no such table",
)


#: Errors of a database that is there, and how long they are waited for, in seconds.
_LASTING = (exc.ProgrammingError, exc.IntegrityError, exc.DataError, exc.NotSupportedError)
_SHORT = 30.0


def shown_url(url: str) -> str:
    """The URL without its password."""
    try:
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    except (exc.ArgumentError, ValueError):  # a port that is no number, for one
        return re.sub(r":(?!//).*@", ":***@", url)


@dataclass(frozen=True)
class Task:
    """Something that is to run once: a key, what describes it, and values for the search."""

    key: str
    attributes: Mapping[str, Any]
    params: Mapping[str, Any] | None = None


class Store:
    """The database; every call waits while it is away, and says so through ``say``.

    ``grace``: seconds without a beat after which a worker counts as dead. ``patience``: seconds
    that a database may be away.
    """

    def __init__(
        self, url: str, say: Callable[[str], None], *, grace: int = GRACE, patience: float = 86400
    ) -> None:
        if url.startswith(("postgresql://", "postgres://")):  # the driver that the extra installs
            url = "postgresql+psycopg://" + url.partition("://")[2]
        self.url, self.say, self.grace, self.patience = url, say, grace, patience
        #: Until then nobody counts as dead: after an outage all beats are old.
        self.trust_beats_from = 0.0
        self.stop: Callable[[], int] = lambda: 0
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.storage: RDBStorage = self.patiently(self._connect)
        self._beats = time.monotonic()

    def _connect(self) -> RDBStorage:
        arguments: dict[str, Any] = {}
        if self.url.startswith("sqlite"):
            path = sqlalchemy.engine.make_url(self.url).database
            if path:
                try:
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise StudyError(
                        f"--storage {self.url}: cannot make its folder: {error.strerror}"
                    ) from None
            arguments["connect_args"] = {"timeout": 60}
        else:
            arguments["pool_pre_ping"] = True
            if "+psycopg" in self.url:  # a database without an encoding would give bytes
                arguments["connect_args"] = {"client_encoding": "utf8", "connect_timeout": 10}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # heartbeats are experimental
            try:
                storage = RDBStorage(
                    self.url,
                    engine_kwargs=arguments,
                    heartbeat_interval=BEAT,
                    grace_period=self.grace,
                )
                if self.url.startswith("sqlite"):
                    _serialise(storage.engine)
                return storage
            except (ImportError, exc.ArgumentError, exc.NoSuchModuleError, ValueError) as error:
                # what is said about a bad number may be a part of the password
                reason = "" if type(error) is ValueError else f": {reading.brief(error)}"
                raise StudyError(
                    f"--storage {shown_url(self.url)}{reason}; allowed is "
                    "postgresql://USER:PASSWORD@HOST:PORT/DATABASE or sqlite:///FILE"
                ) from None
            except RuntimeError as error:  # tables of another version of Optuna
                raise StudyError(
                    f"{shown_url(self.url)} is of another version of Optuna: {reading.brief(error)}"
                ) from None

    def patiently(self, action: Callable[[], _T]) -> _T:
        """``action``, again and again while the database is away. Raises `StudyError`."""
        begun, told, wait = time.monotonic(), False, 0.2
        while True:
            try:
                result = action()
            except (exc.SQLAlchemyError, StorageInternalError) as error:
                reason = _reason(error)
                if any(words in reason.lower() for words in _FATAL):
                    raise StudyError(f"{shown_url(self.url)}: {reason}") from None
                # which two processes may see that make the tables at the same time, but no longer
                lasting = isinstance(_cause(error), _LASTING)
                if lasting and time.monotonic() - begun > _SHORT:
                    raise StudyError(f"{shown_url(self.url)}: {reason}") from None
                if time.monotonic() - begun > self.patience:
                    raise StudyError(
                        f"{shown_url(self.url)} has been away for {self.patience:.0f} s "
                        f"({reason}); nothing is lost: give the same command again when it is back"
                    ) from None
                if self.stop():
                    raise KeyboardInterrupt from None
                if not told and time.monotonic() - begun > 1:
                    told = True
                    self.say(f"the database {shown_url(self.url)} is away, waiting: {reason}")
                time.sleep(wait)
                wait = min(2 * wait, 5.0)
                continue
            if time.monotonic() - begun > BEAT:
                self.trust_beats_from = time.monotonic() + self.grace
            if told:
                self.say("the database is back")
            return result

    def ledger(
        self,
        name: str,
        *,
        sampler: Callable[[], optuna.samplers.BaseSampler] | None = None,
        pruner: optuna.pruners.BasePruner | None = None,
    ) -> Ledger:
        """The study called ``name``, made if there is none. Raises `StudyError`."""

        def load() -> optuna.Study:
            sampled = sampler() if sampler else optuna.samplers.RandomSampler(seed=0)
            kinds: dict[str, Any] = {
                "sampler": sampled,
                "pruner": pruner or optuna.pruners.NopPruner(),
            }
            try:
                study = optuna.create_study(
                    study_name=name, storage=self.storage, direction="maximize", **kinds
                )
            except DuplicatedStudyError:
                study = optuna.load_study(study_name=name, storage=self.storage, **kinds)
            found = study.user_attrs.get("rewire_format")
            if found is None:
                if study.get_trials(deepcopy=False):
                    raise StudyError(
                        f"the study {name!r} in {shown_url(self.url)} was not made by rewire "
                        "compare; choose another name with --study"
                    )
                study.set_user_attr("rewire_format", FORMAT)
            elif found != FORMAT:
                raise StudyError(
                    f"the study {name!r} in {shown_url(self.url)} has format {found}, this version "
                    f"of rewire reads {FORMAT}; choose another name with --study, or use the "
                    "version of rewire that made it"
                )
            return study

        return Ledger(self, self.patiently(load))

    def close(self) -> None:
        """Let go of the connections."""
        with contextlib.suppress(exc.SQLAlchemyError):
            self.storage.remove_session()
            self.storage.engine.dispose()


def _serialise(engine: sqlalchemy.Engine) -> None:
    """Let each transaction of SQLite have the file for itself from its beginning.

    SQLite has no "select for update", by which Optuna sees that a trial still waits when it takes
    it: two processes would claim the same.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # Python's driver begins no transaction by itself

    @sqlalchemy.event.listens_for(engine, "begin")
    def _begun(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # the connection of before knows nothing of this


def _cause(error: BaseException) -> BaseException:
    """What SQLAlchemy raised, if Optuna wrapped it."""
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """What the database says, in one line."""
    error = _cause(error)
    original = getattr(error, "orig", None)
    return reading.brief(" ".join(str(original or error).split()), 200)


class Ledger:
    """The trials of one study, by the keys of what they run."""

    def __init__(self, store: Store, study: optuna.Study) -> None:
        self.store, self.study = store, study

    def _trials(self) -> list[FrozenTrial]:
        return self.store.patiently(lambda: self.study.get_trials(deepcopy=False))

    def standing(self) -> dict[str, FrozenTrial]:
        """By key the trial that counts: ended, failed for good, running or waiting.

        A key whose worker died or stopped is not there, so that it is added again.
        """
        found: dict[str, FrozenTrial] = {}
        died: dict[str, list[FrozenTrial]] = {}
        for trial in self._trials():
            key = trial.user_attrs.get("key")
            if key is None or "duplicate" in trial.user_attrs:
                continue
            if trial.state != TrialState.FAIL or "error" in trial.user_attrs:
                found.setdefault(key, trial)
            elif "stopped" not in trial.user_attrs:
                died.setdefault(key, []).append(trial)
        for key, trials in died.items():
            if len(trials) >= TRIES:
                found.setdefault(key, trials[-1])
        return found

    def add(self, tasks: Iterable[Task]) -> dict[str, FrozenTrial]:
        """Add what is missing, and return what there is (`standing`)."""
        self._bury()
        found = self.standing()
        missing = [task for task in tasks if task.key not in found]
        if not missing:
            return found
        # a run whose worker died goes on with the values that it was given
        former = {t.user_attrs.get("key"): t.params for t in self._trials() if t.params}
        for task in missing:
            attributes = {**task.attributes, "key": task.key}
            params = dict(former.get(task.key) or task.params or {})
            self.store.patiently(
                lambda attributes=attributes, params=params: self.study.enqueue_trial(  # type: ignore[misc]
                    params, user_attrs=attributes
                )
            )
        return self.standing()

    def _bury(self) -> None:
        """End the trials whose workers died: those without a beat, and of this machine at once."""
        if time.monotonic() >= self.store.trust_beats_from:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.store.patiently(lambda: optuna.storages.fail_stale_trials(self.study))
        here = _machine()
        for trial in self._trials():
            if trial.state == TrialState.RUNNING:
                worker = trial.user_attrs.get("worker", {})
                if worker.get("machine") == here and not _alive(worker):
                    self._end(trial._trial_id, TrialState.FAIL)

    def claim(self, keys: Iterable[str]) -> Trial | None:
        """Take a trial that waits, the oldest first; None if there is none of these keys."""
        wanted = set(keys)
        for trial in self._trials():
            if trial.state != TrialState.WAITING or trial.user_attrs.get("key") not in wanted:
                continue
            number = trial._trial_id
            # the beat comes first: a trial that runs without one would never be found
            self.beat(number)
            if not self.store.patiently(lambda n=number: self._begin(n)):  # type: ignore[misc]
                continue
            claimed = Trial(self.study, number)
            pid = os.getpid()
            worker = {"host": socket.gethostname(), "pid": pid, "born": _born(pid)}
            worker["machine"] = _machine()
            self.note(claimed, worker=worker)
            if self._is_second(trial):
                self.note(claimed, duplicate=True)
                self._end(number, TrialState.FAIL)
                continue
            return claimed
        return None

    def _begin(self, number: int) -> bool:
        try:
            return self.store.storage.set_trial_state_values(number, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _is_second(self, trial: FrozenTrial) -> bool:
        """Whether two processes added the same run at the same moment, and this came later."""
        key = trial.user_attrs["key"]
        return any(
            other.user_attrs.get("key") == key
            and other.number < trial.number
            and other.state != TrialState.FAIL
            for other in self._trials()
        )

    def beat(self, number: int) -> None:
        """Say that the trial's worker is alive."""

        def record() -> None:
            # two workers may make the first beat of a trial that waits
            with contextlib.suppress(exc.IntegrityError):
                self.store.storage.record_heartbeat(number)

        self.store.patiently(record)

    def is_ours(self, trial: Trial) -> bool:
        """Whether the trial still runs here: nobody took this worker for dead."""
        found = self.store.patiently(lambda: self.store.storage.get_trial(trial._trial_id))
        return bool(found.state == TrialState.RUNNING)

    def note(self, trial: Trial, **attributes: Any) -> None:
        """Write attributes of a trial that runs; of one that was ended by others nothing."""
        for name, value in attributes.items():
            with contextlib.suppress(UpdateFinishedTrialError):
                self.store.patiently(lambda n=name, v=value: trial.set_user_attr(n, v))  # type: ignore[misc]

    def finish(self, trial: Trial, value: float | None, *, pruned: bool = False) -> None:
        """End a trial with its value. One that is no number counts as a failure: Optuna would write
        it, and nobody could read the study again.
        """
        if value is not None and math.isnan(value):
            self.fail(trial, error="its score is not a number")
            return
        state = TrialState.PRUNED if pruned else TrialState.COMPLETE
        self._end(trial._trial_id, state, None if value is None else [value])

    def fail(self, trial: Trial, **why: Any) -> None:
        """End a trial without a value: with ``error`` for good, with ``stopped`` for now."""
        self.note(trial, **why)
        self._end(trial._trial_id, TrialState.FAIL)

    def _end(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        def end() -> None:
            with contextlib.suppress(UpdateFinishedTrialError):
                self.store.storage.set_trial_state_values(number, state, values)

        self.store.patiently(end)


def is_failed(trial: FrozenTrial) -> bool:
    """Whether the trial's run cannot be made."""
    return bool(trial.state == TrialState.FAIL)


def is_ended(trial: FrozenTrial) -> bool:
    """Whether nothing more comes of the trial's key."""
    return trial.state in _ENDED or trial.state == TrialState.FAIL


def _machine() -> str:
    """This boot of this machine, and the space that its process numbers are of."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _born(pid: int) -> str:
    """When a process began, in the system's own count; "" where that is not told."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _alive(worker: Mapping[str, Any]) -> bool:
    """Whether the process that claimed a trial on this machine is there."""
    pid = worker.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return not worker.get("born") or _born(pid) == worker["born"]

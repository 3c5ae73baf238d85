"""The trials of a study: added once, claimed once, found again when a worker dies."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from rewire.app.errors import StudyError
from rewire.app.studies import store as module
from rewire.app.studies.store import TRIES, Ledger, Store, Task

TASKS = [Task(f"run {number}", {"number": number}) for number in range(5)]
KEYS = [task.key for task in TASKS]


class Told(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'deep' / 'study.db'}"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    made = Store(url, Told())
    yield made
    made.close()


def test_a_task_is_added_once_and_claimed_once(store: Store) -> None:
    first, second = store.ledger("one"), store.ledger("one")
    first.add(TASKS)
    second.add(TASKS)
    claimed = [ledger.claim(KEYS) for ledger in (first, second) * 3]
    keys = [trial.user_attrs["key"] for trial in claimed if trial is not None]
    assert sorted(keys) == KEYS
    assert claimed[-1] is None


def test_two_that_add_at_once_leave_one_run_of_each(store: Store) -> None:
    """Both look before either adds: each task is there twice, and one of the two is run."""
    first, second = store.ledger("one"), store.ledger("one")
    seen = second.standing()
    first.add(TASKS)
    second.standing = lambda: seen  # type: ignore[method-assign]
    second.add(TASKS)
    del second.standing  # type: ignore[method-assign]
    assert len(first._trials()) == 2 * len(TASKS)
    ran = []
    while (trial := first.claim(KEYS)) is not None:
        ran.append(trial.user_attrs["key"])
        first.note(trial, outcome={"score": 0.5})
        first.finish(trial, 0.5)
    assert sorted(ran) == KEYS
    assert all(t.state == TrialState.COMPLETE for t in first.standing().values())


def test_many_at_once_claim_each_run_once(url: str) -> None:
    def work(_: int) -> list[str]:
        store = Store(url, Told())
        ledger, ran = store.ledger("one"), []
        ledger.add(TASKS)
        while (trial := ledger.claim(KEYS)) is not None:
            ran.append(trial.user_attrs["key"])
            ledger.finish(trial, 1.0)
        store.close()
        return ran

    Store(url, Told()).ledger("one").add(TASKS)
    with ThreadPoolExecutor(4) as pool:
        ran = [key for part in pool.map(work, range(4)) for key in part]
    assert sorted(ran) == KEYS


DIES = """
import sys, os
from rewire.app.studies.store import Store, Task
store = Store(sys.argv[1], print)
ledger = store.ledger("one")
ledger.add([Task("run 0", {})])
trial = ledger.claim(["run 0"])
trial.suggest_float("lr", 0.1, 0.2)
os.kill(os.getpid(), 9)
"""


def test_the_run_of_a_process_that_died_here_is_there_at_once(url: str) -> None:
    done = subprocess.run([sys.executable, "-c", DIES, url], check=False, timeout=120)
    assert done.returncode == -9
    store = Store(url, Told())
    ledger = store.ledger("one")
    (lost,) = ledger._trials()
    assert lost.state == TrialState.RUNNING
    ledger.add([Task("run 0", {})])
    again = ledger.claim(["run 0"])
    assert again is not None
    # with the values that the search had given it, so that its checkpoint fits
    assert again.suggest_float("lr", 0.1, 0.2) == lost.params["lr"]
    assert [t.state for t in ledger._trials()] == [TrialState.FAIL, TrialState.RUNNING]
    store.close()


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process look like one on another machine."""
    monkeypatch.setattr(module, "_machine", lambda: "another machine")


def test_a_silent_worker_elsewhere_counts_as_dead_after_the_grace(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(url, Told(), grace=2)
    ledger = store.ledger("one")
    ledger.add(TASKS[:1])
    trial = ledger.claim(KEYS)
    assert trial is not None
    elsewhere(monkeypatch)
    for _ in range(4):  # while it beats, nobody takes it
        ledger.beat(trial._trial_id)
        time.sleep(0.7)
        ledger.add(TASKS[:1])
    assert ledger.is_ours(trial)
    time.sleep(4)
    ledger.add(TASKS[:1])
    assert not ledger.is_ours(trial)
    # what it says from now on changes nothing
    ledger.finish(trial, 0.9)
    ledger.note(trial, outcome={})
    again = ledger.claim(KEYS)
    assert again is not None
    assert again.number != trial.number
    store.close()


def test_after_an_outage_nobody_counts_as_dead_until_all_could_beat(url: str) -> None:
    store = Store(url, Told(), grace=1)
    ledger = store.ledger("one")
    ledger.add(TASKS[:1])
    trial = ledger.claim(KEYS)
    assert trial is not None
    store.trust_beats_from = time.monotonic() + 60
    time.sleep(2.5)
    ledger.add(TASKS[:1])
    assert ledger.is_ours(trial)
    store.close()


def test_a_run_whose_worker_dies_each_time_is_given_up(store: Store) -> None:
    ledger = store.ledger("one")
    for number in range(TRIES):
        ledger.add(TASKS[:1])
        trial = ledger.claim(KEYS)
        assert trial is not None, number
        ledger.fail(trial, died="by signal 9")
    found = ledger.add(TASKS[:1])
    assert ledger.claim(KEYS) is None
    assert found["run 0"].state == TrialState.FAIL


def test_a_stop_is_no_death_and_an_error_is_for_good(store: Store) -> None:
    ledger = store.ledger("one")
    for _ in range(TRIES + 1):
        ledger.add(TASKS[:1])
        trial = ledger.claim(KEYS)
        assert trial is not None
        ledger.fail(trial, stopped=True)
    ledger.add(TASKS[:1])
    trial = ledger.claim(KEYS)
    assert trial is not None
    ledger.fail(trial, error="training diverged")
    assert ledger.add(TASKS[:1])["run 0"].user_attrs["error"] == "training diverged"
    assert ledger.claim(KEYS) is None


def test_a_study_of_another_version_or_program_is_left_alone(store: Store) -> None:
    ledger = store.ledger("one")
    ledger.study.set_user_attr("rewire_format", 99)
    with pytest.raises(StudyError, match="has format 99, this version of rewire reads 1"):
        store.ledger("one")
    optuna.create_study(study_name="theirs", storage=store.storage).add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    with pytest.raises(StudyError, match=r"'theirs' in .* was not made by rewire compare"):
        store.ledger("theirs")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(b"no database at all " * 100)
    with pytest.raises(StudyError, match="not a database"):
        Store(f"sqlite:///{path}", Told())
    with pytest.raises(StudyError, match="allowed is postgresql"):
        Store("nothing at all", Told())
    with pytest.raises(StudyError, match="allowed is postgresql"):
        Store("oracle+nothing://x/y", Told())


def test_a_locked_database_is_waited_for(url: str) -> None:
    store = Store(url, Told())
    ledger = store.ledger("one")
    path = url.removeprefix("sqlite:///")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin exclusive")
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(ledger.add, TASKS[:1])
        time.sleep(1)
        assert not adding.done()
        other.execute("commit")
        assert list(adding.result(timeout=90)) == ["run 0"]
    other.close()
    store.close()


def test_patience_ends(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    store = Store(url, told, patience=2)

    def away() -> None:
        raise module.exc.OperationalError("select", {}, Exception("connection refused"))

    with pytest.raises(StudyError, match="nothing is lost: give the same command again"):
        store.patiently(away)
    assert told == [f"the database {url} is away, waiting: connection refused"]
    store.close()


def test_a_password_is_not_shown() -> None:
    assert "secret" not in module.shown_url("postgresql://me:secret@host/base")
    assert (
        module.shown_url("postgresql://me:p@ss@host:port/base")
        == "postgresql://me:***@host:port/base"
    )


def test_an_error_that_stays_is_not_waited_for_all_day(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_SHORT", 0.5)
    store = Store(f"sqlite:///{tmp_path / 'study.db'}", Told())

    def wrong() -> None:
        raise module.exc.ProgrammingError("select", {}, Exception("syntax error"))

    with pytest.raises(StudyError, match="syntax error"):
        store.patiently(wrong)
    store.close()


@pytest.mark.parametrize(
    "url", ["postgresql://me:secret@host:abc/base", "postgresql://me:secret", "me:secret@host/base"]
)
def test_a_url_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(StudyError, match="allowed is postgresql://USER:PASSWORD@HOST") as found:
        Store(url, Told(), patience=1)
    assert "@" not in url or "secret" not in str(found.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot make its folder"):
        Store(f"sqlite:///{tmp_path}/file/study.db", Told(), patience=1)


def test_a_score_that_is_no_number_fails_and_the_study_can_be_read(store: Store) -> None:
    ledger = store.ledger("one")
    ledger.add(TASKS[:1])
    trial = ledger.claim(KEYS)
    assert trial is not None
    ledger.finish(trial, float("nan"))
    (found,) = store.ledger("one").standing().values()
    assert found.state == TrialState.FAIL
    assert found.user_attrs["error"] == "its score is not a number"


def test_a_process_of_another_birth_is_not_the_worker() -> None:
    me = {"pid": os.getpid(), "born": module._born(os.getpid())}
    assert module._alive(me)
    if me["born"]:
        assert not module._alive(me | {"born": "1"})
    assert isinstance(Ledger, type)

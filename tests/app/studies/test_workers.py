"""Real workers, killed with SIGKILL, on SQLite and on PostgreSQL, whose server goes away and comes
back: every run ends once, and as if nothing had happened.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from postgres import Postgres
from rewire.app import data
from rewire.app.studies.store import Store
from rewire.app.train import loop
from rewire.app.train.config import make_config
from rewire.app.train.run_dir import RunDir

pytestmark = pytest.mark.slow

WORKER = """
import sys
import rewire.__main__
import rewire.app.studies.store as store
if __name__ == "__main__":
    machine = sys.argv.pop(1)
    store._machine = lambda: machine
    rewire.__main__.main()
"""
STUDY = ["compare", "--methods", "static,set", "--seeds", "3", "--epochs", "25"]
STUDY += ["--model", "mlp:30", "--study", "s", "--jobs", "1", "--grace", "15"]


def start(machine: str, folder: Path, url: str) -> subprocess.Popen[str]:
    """Begin a worker that says it is on ``machine``."""
    folder.mkdir(exist_ok=True)
    script = folder / "worker.py"
    script.write_text(WORKER)
    with open(folder / "told", "a") as told:
        return subprocess.Popen(
            [sys.executable, str(script), machine, *STUDY, "--out", str(folder), "--storage", url],
            stdout=told,
            stderr=told,
            text=True,
        )


def wait_for(true: Callable[[], bool], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.2)


class Watch:
    """Looks at the trials of the study."""

    def __init__(self, url: str) -> None:
        self.store = Store(url, lambda line: None)
        self.ledger = self.store.ledger("s")

    def close(self) -> None:
        self.store.close()

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return [t for t in self.ledger._trials() if t.state in states]

    def running(self, machine: str) -> list[FrozenTrial]:
        trials = self.trials(TrialState.RUNNING)
        return [t for t in trials if t.user_attrs.get("worker", {}).get("machine") == machine]


def each_ended_once(watch: Watch) -> list[FrozenTrial]:
    complete = watch.trials(TrialState.COMPLETE)
    keys = [t.user_attrs["key"] for t in complete]
    assert len(keys) == len(set(keys)) == 6
    assert not watch.trials(TrialState.RUNNING, TrialState.WAITING)
    return complete


def is_what_an_undisturbed_run_gives(trial: FrozenTrial, folder: Path, place: Path) -> None:
    config = make_config(trial.user_attrs["options"])
    result = loop.run(config, data.load("digits"), RunDir(place))
    assert trial.value == result["test_accuracy"]
    sums = [
        hashlib.sha256((f / "model.safetensors").read_bytes()).hexdigest() for f in (folder, place)
    ]
    assert sums[0] == sums[1]


def test_kill_9_loses_at_most_an_epoch(tmp_path: Path) -> None:
    folder, url = tmp_path / "out", f"sqlite:///{tmp_path / 'study.db'}"
    worker = start("here", folder, url)
    watch = Watch(url)
    wait_for(lambda: bool(watch.running("here")))
    (lost,) = watch.running("here")
    metrics = folder / "runs"

    def epochs() -> int:
        files = list(metrics.glob("*seed-0*/metrics.jsonl"))
        return max((len(file.read_text().splitlines()) for file in files), default=0)

    wait_for(lambda: epochs() >= 5)
    worker.send_signal(signal.SIGKILL)
    worker.wait(timeout=30)
    done = epochs()
    again = start("here", folder, url)
    assert again.wait(timeout=400) == 0, (folder / "told").read_text()
    complete = each_ended_once(watch)
    (trial,) = (t for t in complete if t.user_attrs["key"] == lost.user_attrs["key"])
    assert trial.number != lost.number
    (run,) = (f for f in metrics.iterdir() if lost.user_attrs["key"].split()[-1] in f.name)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 25 > done
    # the child of the killed worker noticed, or the new one waited for it: nothing was overwritten
    is_what_an_undisturbed_run_gives(trial, run, tmp_path / "undisturbed")
    told = (folder / "told").read_text()
    assert told.count("test ") == 6, told
    watch.close()


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.close()


def test_two_machines_one_dies_and_the_database_goes_away(
    tmp_path: Path, postgres: Postgres
) -> None:
    pytest.importorskip("psycopg")
    folders = {name: tmp_path / name for name in ("one", "two")}
    workers = {name: start(name, folder, postgres.url) for name, folder in folders.items()}
    watch = Watch(postgres.url)
    wait_for(lambda: bool(watch.running("one") and watch.running("two")))
    (lost,) = watch.running("one")
    os.kill(workers["one"].pid, signal.SIGKILL)
    workers["one"].wait(timeout=30)
    postgres.stop()
    time.sleep(8)
    postgres.start()
    assert workers["two"].wait(timeout=500) == 0, (folders["two"] / "told").read_text()
    told = (folders["two"] / "told").read_text()
    assert "is away, waiting: " in told
    assert "the database is back" in told
    complete = each_ended_once(watch)
    again = [t for t in complete if t.user_attrs["key"] == lost.user_attrs["key"]]
    assert [t.user_attrs["worker"]["machine"] for t in again] == ["two"]
    assert lost.number not in [t.number for t in complete]
    assert "rewire@" in told
    watch.close()
    assert "| set |" in (folders["two"] / "table.md").read_text()

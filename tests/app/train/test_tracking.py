"""What trackers are told of a run: what metrics.jsonl says, once, whatever interrupts the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import toy
from rewire.__main__ import main
from rewire.app.errors import RunFileError, StoppedError, TrainError
from rewire.app.train import loop, tracking
from rewire.app.train.observer import Observer
from rewire.app.train.run_dir import RunDir
from rewire.app.train.tracking import TRACKING, Tracking, figures

HEARD: list[tuple[str, int, dict[str, float]]] = []


class Fake:
    """A tracker that remembers; one that is told to fail does so from epoch 2 on."""

    fails = False

    def __init__(self, folder: Path, key: str, step: int, options: Mapping[str, Any]) -> None:
        self.key = key

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self.fails and figures.get("epoch", 0) >= 2:
            raise OSError("no space left")
        HEARD.append((self.key, step, dict(figures)))

    def close(self) -> None:
        HEARD.append((self.key, -1, {}))


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    HEARD.clear()
    monkeypatch.setitem(tracking.LOGGERS, "fake", ("json", Fake))


def run(folder: Path, names: list[str], *, resume: bool = False, stop: int = 0) -> None:
    """Train; with ``stop``, until that step is over."""
    watcher = Tracking(Observer(), names, folder, {"lr": 1})
    config = toy.config(checkpoint_every=1, epochs=4)
    asked = iter(range(1, 10_000))
    try:
        loop.run(
            config,
            toy.dataset(),
            RunDir(folder),
            resume=resume,
            observer=watcher,
            stop=lambda: 2 if next(asked) == stop else 0,
        )
    finally:
        watcher.close()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def heard() -> list[tuple[int, float]]:
    return [(step, told["train_loss"]) for _, step, told in HEARD if "train_loss" in told]


def test_a_tracker_is_told_what_metrics_say(tmp_path: Path) -> None:
    run(tmp_path / "run", ["fake"])
    written = lines(tmp_path / "run")
    assert heard() == [(line["step"], line["train_loss"]) for line in written]
    told = HEARD[0][2]
    assert told["connections"] == sum(written[0]["connections"])
    assert told["turnover"] == sum(written[0]["grown"]) / sum(written[0]["connections"])
    assert told["connections/0.weight"] == written[0]["connections"][0]
    assert HEARD[-2][2].keys() >= {"test_accuracy", "test_loss", "density"}
    assert HEARD[-1][1] == -1  # closed


def test_a_run_that_was_interrupted_is_one_run_without_gaps(tmp_path: Path) -> None:
    run(tmp_path / "whole", ["fake"])
    expected = heard()
    HEARD.clear()
    folder = tmp_path / "run"
    with pytest.raises(StoppedError):
        run(folder, ["fake"], stop=9)
    assert 0 < len(heard()) < len(expected)
    run(folder, ["fake"], resume=True)
    assert heard() == expected
    assert len({key for key, _, _ in HEARD}) == 1


def test_what_a_kill_kept_from_a_tracker_is_told_on_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(StoppedError):
        run(folder, [], stop=9)  # as if it had been killed before anything was logged
    (folder / TRACKING).unlink()
    run(folder, ["fake"], resume=True)
    assert heard() == [(line["step"], line["train_loss"]) for line in lines(folder)]


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Fake, "fails", True)
    run(tmp_path / "run", ["fake"])
    assert RunDir(tmp_path / "run").is_finished()
    assert len(heard()) == 1
    assert capsys.readouterr().err == "warning: --log fake has stopped: no space left\n"
    assert json.loads((tmp_path / "run" / TRACKING).read_text())["epochs"] == {"fake": 1}


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(StoppedError):
        run(folder, ["fake"], stop=9)
    (folder / TRACKING).write_text('{"key": "a\' or 1", "epochs": {}}')
    with pytest.raises(RunFileError, match=r"tracking.json is damaged: delete it"):
        run(folder, ["fake"], resume=True)


def test_numbers_of_layers_have_their_names() -> None:
    line = {"epoch": 1, "step": 9, "connections": [3, 5], "grown": [1, 1], "dropped": [1, 1]}
    found = figures(line | {"turnover": [0.3, 0.2], "units": [], "validation_loss": None}, "ab")
    assert found["connections"] == 8
    assert found["turnover"] == 0.25
    assert found["turnover/a"] == 0.3
    assert "validation_loss" not in found


def test_names_are_checked_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainError, match=r"--log.*'tensorbord'.*did you mean 'tensorboard'"):
        tracking.parse("tensorbord")
    monkeypatch.setitem(tracking.LOGGERS, "absent", ("no_such_package", Fake))
    with pytest.raises(TrainError, match=r"pip install 'torch-rewire\[absent\]'"):
        tracking.parse("fake, absent")
    assert tracking.parse("fake,fake") == ["fake"]
    assert tracking.parse(None) == []


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    with pytest.raises(StoppedError):
        run(folder, ["tensorboard"], stop=9)
    run(folder, ["tensorboard"], resume=True)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("connections")]
    assert found == [(line["step"], sum(line["connections"])) for line in lines(folder)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_one_run_with_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    pytest.importorskip("alembic", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder = tmp_path / "run"
    with pytest.raises(StoppedError):
        run(folder, ["mlflow"], stop=9)
    run(folder, ["mlflow"], resume=True)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("rewire")
    [found] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train_loss")
    assert [m.step for m in history] == [line["step"] for line in lines(folder)]
    assert found.data.params["lr"] == "1"
    assert found.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = tmp_path / "run"
    run(folder, ["wandb"])
    key = json.loads((folder / TRACKING).read_text())["key"]
    [data] = folder.glob(f"wandb/offline-run-*-{key}/*.wandb")
    assert b"validation_loss" in data.read_bytes() or b"train_loss" in data.read_bytes()


def test_the_command_refuses_an_unknown_tracker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["rewire", "train", "--log", "abc", "--run-dir", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--log" in capsys.readouterr().err
    assert not folder.exists()

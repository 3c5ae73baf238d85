"""Runs in the trackers that people look at: TensorBoard, MLflow, Weights & Biases.

Every run writes `metrics.jsonl`, which is the record that counts; trackers get the same numbers.
The file `tracking.json` holds the key of the run in the trackers, and how many epochs each of them
has, so that a run that was killed and goes on stays one run there.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from rewire.app import run_files
from rewire.app.errors import RunFileError, TrainError
from rewire.app.run_files import METRICS, TENSORBOARD, TRACKING
from rewire.app.train.config import check_name
from rewire.app.train.metrics import EpochRecord
from rewire.app.train.observer import Observer
from rewire.storage import files

__all__ = ["LOGGERS", "TRACKING", "Logger", "Tracking", "figures", "parse"]


class Logger(Protocol):
    """A run in one tracker. An error in it ends the tracking, not the run."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Numbers by name, as they are after optimizer step ``step``."""

    def close(self) -> None:
        """The run has stopped or ended: send all that was logged."""


class TensorBoard:
    """Events in the folder ``tensorboard`` of the run."""

    def __init__(self, folder: Path, key: str, step: int, options: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a killed run had logged after this step is hidden
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1)
        self._writer.add_text("options", f"```\n{json.dumps(options, indent=2)}\n```", step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """One scalar each."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class MLflow:
    """A run of the experiment ``rewire`` (or $MLFLOW_EXPERIMENT_NAME) where $MLFLOW_TRACKING_URI
    says, by default ``mlflow.db`` here.
    """

    def __init__(self, folder: Path, key: str, step: int, options: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rewire")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        known = self._client.search_runs([experiment], f"tags.rewire = '{key}'")
        if known:
            self._run = known[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        run = self._client.create_run(experiment, tags={"rewire": key}, run_name=folder.name)
        self._run = run.info.run_id
        params = [Param(name, str(value)[:500]) for name, value in options.items()]
        self._client.log_batch(self._run, params=params)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """All metrics in one call."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """Say that the run has ended."""
        self._client.set_terminated(self._run)


class WandB:
    """A run of the project ``rewire`` (or $WANDB_PROJECT), kept in the run's folder until ``wandb
    sync``; $WANDB_MODE=online sends it at once.
    """

    def __init__(self, folder: Path, key: str, step: int, options: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rewire"),
            mode=os.environ.get("WANDB_MODE", "offline"),
            dir=str(folder),
            id=key,
            name=folder.name,
            resume="allow",
            config=dict(options),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """All numbers of a step at once."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """Wait until all is written."""
        self._run.finish()


#: By the name for ``--log``: the module that it needs, and the class that tracks.
LOGGERS: dict[str, tuple[str, Callable[[Path, str, int, Mapping[str, Any]], Logger]]] = {
    "mlflow": ("mlflow", MLflow),
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WandB),
}


def parse(text: str | None) -> list[str]:
    """The names in ``--log``. Raises TrainError for an unknown one, and for a missing package."""
    names = list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    for name in names:
        check_name("--log", name, sorted(LOGGERS))
        package = LOGGERS[name][0]
        try:
            importlib.import_module(package)
        except ImportError:
            raise TrainError(
                f"--log {name} needs {package}, which cannot be found; install it with: "
                f"pip install 'torch-rewire[{name}]'"
            ) from None
    return names


def figures(line: Mapping[str, Any], layers: Sequence[str]) -> dict[str, float]:
    """The numbers of a line of metrics, by name; those of a layer are ``connections/LAYER``."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            if len(value) == len(layers):
                found |= {f"{name}/{layer}": x for layer, x in zip(layers, value, strict=True)}
            if name != "turnover":
                found[name] = sum(value)
        elif value is not None and name != "step":
            found[name] = value
    if "grown" in found:
        found["turnover"] = found["grown"] / max(found["connections"], 1)
    return found


class Tracking(Observer):
    """Tells trackers of a run, and passes everything on to another observer."""

    def __init__(
        self, inner: Observer, names: Sequence[str], folder: Path, options: Mapping[str, Any]
    ) -> None:
        self.inner, self.names, self.folder, self.options = inner, names, folder, options
        self.loggers: dict[str, Logger] = {}
        self.layers: list[str] = []
        self.key, self.known = "", dict.fromkeys(names, 0)  # epochs that each tracker knows

    def made(self, parts: Any, *, resume: bool) -> None:
        """Pass it on."""
        self.inner.made(parts, resume=resume)

    def started(self, info: Mapping[str, Any], epochs: int, batches: int, done: int) -> None:
        """Begin; or go on, and send each tracker the epochs that it missed."""
        self.inner.started(info, epochs, batches, done)
        self.layers = [layer["name"] for layer in info["layers"]]
        self.key = secrets.token_hex(8)
        if done:
            self._restore()
        lines = run_files.read_metrics(self.folder) if (self.folder / METRICS).exists() else []
        for name in self.names:
            known = [line["step"] for line in lines if line["epoch"] <= self.known[name]]
            step = known[-1] if known else 0
            self._try(name, partial(self._begin, name, step))
        for line in lines:
            self._log(line)
        self._save()

    def progress(self, progress: Any) -> None:
        """Pass it on."""
        self.inner.progress(progress)

    def epoch_ended(self, record: EpochRecord) -> None:
        """Log the line that was written."""
        self.inner.epoch_ended(record)
        self._log(json.loads(record.to_line()))
        self._save()

    def finished(self, model: nn.Module, result: Mapping[str, Any]) -> None:
        """Log the scores of the end."""
        self.inner.finished(model, result)
        last = {name: value for name, value in result.items() if name.startswith("test_")}
        last["density"] = result["density"]
        for name in list(self.loggers):
            self._try(name, partial(self.loggers[name].log, result["steps"], last))

    def close(self) -> None:
        """Close all trackers."""
        for name in list(self.loggers):
            self._try(name, self.loggers[name].close)

    def _begin(self, name: str, step: int) -> None:
        self.loggers[name] = LOGGERS[name][1](self.folder, self.key, step, self.options)

    def _log(self, line: Mapping[str, Any]) -> None:
        numbers = figures(line, self.layers)
        for name in list(self.loggers):
            if line["epoch"] > self.known[name]:
                self._try(name, partial(self.loggers[name].log, line["step"], numbers))
                if name in self.loggers:  # else it has failed, and does not know this epoch
                    self.known[name] = line["epoch"]

    def _try(self, name: str, call: Callable[[], None]) -> None:
        """Let a tracker do something; if it cannot, the run goes on without it."""
        try:
            call()
        except Exception as error:  # somebody else's code, servers and disks
            self.loggers.pop(name, None)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            print(f"warning: --log {name} has stopped: {reason}", file=sys.stderr)

    def _save(self) -> None:
        text = json.dumps({"key": self.key, "epochs": self.known}) + "\n"
        files.write_atomic(self.folder / TRACKING, text.encode())

    def _restore(self) -> None:
        """Read the key of the run and how many epochs each tracker has, if it was tracked."""
        path = self.folder / TRACKING
        if not path.exists():
            return
        found = run_files.read_object(path)
        key, epochs = found.get("key"), found.get("epochs")
        if not isinstance(key, str) or not key.isalnum() or not isinstance(epochs, dict):
            raise RunFileError(f"{path} is damaged: delete it; trackers then get a new run")
        self.key = key
        self.known |= {n: k for n, k in epochs.items() if n in self.known and type(k) is int}

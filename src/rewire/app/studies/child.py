"""One run of a study, in a process of its own: what it takes is its own, and so is its end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it: here once, not in every child

from rewire.app.data import Dataset
from rewire.app.errors import StoppedError, UserError
from rewire.app.memory import is_exhausted
from rewire.app.studies.measure import Meter
from rewire.app.train import command, loop
from rewire.app.train.config import TrainConfig, make_config
from rewire.app.train.metrics import EpochRecord
from rewire.app.train.observer import Progress
from rewire.app.train.run_dir import RunDir

__all__ = ["execute", "nothing"]

#: Seconds that a folder may be locked by a process that is about to end.
LOCKED = 20.0
_LATE = 1.0  # seconds between messages on progress


def nothing() -> None:
    """Do nothing, in a process that has imported everything."""


class _Told:
    """What the process that began the run asks for: to stop; its own end asks for the same."""

    def __init__(self, connection: Connection) -> None:
        self.asked = ""
        self.connection = connection
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            self.asked = self.connection.recv()
        except (EOFError, OSError):
            self.asked = "stop"

    def __call__(self) -> int:
        return signal.SIGTERM if self.asked else 0


class _Reporter(Meter):
    """A meter that tells how far the run is."""

    def __init__(self, folder: Path, dataset: Dataset, config: TrainConfig, told: _Told) -> None:
        super().__init__(folder, dataset)
        self.epochs, self.told, self.due = config.epochs, told, 0.0
        self.batches = 1

    def started(self, info: Mapping[str, Any], epochs: int, batches: int, done: int) -> None:
        self.batches = batches
        self._tell("progress", done / max(batches * epochs, 1))

    def progress(self, progress: Progress) -> None:
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + _LATE
            done = progress.epoch - 1 + progress.batch / self.batches
            self._tell("progress", done / self.epochs)

    def epoch_ended(self, record: EpochRecord) -> None:
        super().epoch_ended(record)
        self._tell("epoch", [record.epoch, record.validation_score, record.train_loss])

    def _tell(self, kind: str, value: Any) -> None:
        try:
            self.told.connection.send((kind, value))
        except OSError:  # nobody listens any more
            self.told.asked = self.told.asked or "stop"


def execute(connection: Connection, values: Mapping[str, Any], folder: str, threads: int) -> None:
    """Train one run and send what came of it: ("done" | "stopped" | "failed", what)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever began the run tells it to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    told = _Told(connection)
    answer: tuple[str, Any]
    try:
        answer = ("done", _train(values, Path(folder), told))
    except StoppedError:
        answer = ("stopped", told.asked)
    except UserError as error:
        answer = ("failed", str(error))
    except Exception as error:
        if not is_exhausted(error):
            connection.send(("failed", f"a fault of the program: {error!r}"))
            raise
        answer = ("failed", "out of memory")
    try:
        connection.send(answer)
    except OSError:
        return


def _train(values: Mapping[str, Any], folder: Path, told: _Told) -> dict[str, Any]:
    config = make_config(values)
    dataset = command.load_data(config)
    place = RunDir(folder)
    until = time.monotonic() + LOCKED
    while True:
        meter = _Reporter(folder, dataset, config, told)
        resume = place.has_run()
        try:
            # A run that was finished, but not entered, makes its result anew from the last
            # checkpoint, and the same.
            result = loop.run(config, dataset, place, resume=resume, observer=meter, stop=told)
        except UserError as error:
            if "another process is training here" in str(error) and time.monotonic() < until:
                time.sleep(0.2)
                continue
            raise
        break
    loss = result["test_loss"]
    validation = meter.measured["curves"]["validation_accuracy"][-1]
    return {
        **meter.measured,
        "score": result[f"test_{result['info']['score']}"],
        "loss": loss,
        "validation": validation,
    }

"""How others watch a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewire.app.train.metrics import EpochRecord


@dataclass(frozen=True)
class Progress:
    """A run at one moment; `turnover` is of this epoch so far, over all layers."""

    epoch: int
    batch: int
    loss: float
    accuracy: float
    connections: int
    turnover: float


class Observer:
    """Watches a run; this one does nothing."""

    def started(self, info: Mapping[str, Any], epochs: int, batches: int, done: int) -> None:
        """Training begins, or goes on with step number `done`."""

    def progress(self, progress: Progress) -> None:
        """Called a few times a second."""

    def epoch_ended(self, record: EpochRecord) -> None:
        """An epoch is over and its line is written."""

"""How others watch a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from rewire.app.train.metrics import EpochRecord

if TYPE_CHECKING:  # it makes the observers' calls
    from rewire.app.train.parts import Parts


@dataclass(frozen=True)
class Progress:
    """A run at one moment; `turnover` is of this epoch so far, over all layers.

    `accuracy` is the task's score; of a regression, R².
    """

    epoch: int
    batch: int
    loss: float
    accuracy: float
    connections: int
    turnover: float


class Observer:
    """Watches a run; this one does nothing."""

    def made(self, parts: Parts, *, resume: bool) -> None:
        """All parts are made; a run that is resumed is not where it was yet."""

    def started(self, info: Mapping[str, Any], epochs: int, batches: int, done: int) -> None:
        """Training begins, or goes on with step number `done`."""

    def progress(self, progress: Progress) -> None:
        """Called a few times a second."""

    def epoch_ended(self, record: EpochRecord) -> None:
        """An epoch is over and its line is written."""

    def finished(self, model: nn.Module, result: Mapping[str, Any]) -> None:
        """The finished network and the result, which is written."""

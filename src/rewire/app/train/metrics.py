"""What a run reports about itself."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from rewire import _native
from rewire._version import __version__
from rewire.app.train.batches import Inputs
from rewire.app.train.task import CLASSIFICATION, Task
from rewire.nn.forward.modes import evaluating

# at a time: samples, input numbers, and, where each step has an answer, steps: networks for images
# and sequences have many activations for each
EVALUATION_BATCH, EVALUATION_NUMBERS, EVALUATION_STEPS = 1000, 1 << 20, 1 << 14


@dataclass(frozen=True)
class EpochRecord:
    """One line of `metrics.jsonl`. Lists have one entry per layer; turnover is grown / connections.

    units: outputs that take part, see `rewire.app.train.remaining`; runs of older versions have
        none.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_accuracy: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    connections: list[int]
    dropped: list[int]
    grown: list[int]
    turnover: list[float]
    seconds: float
    units: list[int] = field(default_factory=list)
    train_r2: float | None = None
    validation_r2: float | None = None

    @property
    def score(self) -> str:
        """Which score the task has: "accuracy" or "r2"."""
        return "r2" if self.train_accuracy is None else "accuracy"

    @property
    def train_score(self) -> float:
        """The task's score of the training steps of this epoch."""
        return float(getattr(self, f"train_{self.score}"))

    @property
    def validation_score(self) -> float | None:
        """The task's score of the validation samples."""
        found: float | None = getattr(self, f"validation_{self.score}")
        return found

    def to_line(self) -> str:
        """The line, with its line end; of the two kinds of score it has the task's."""
        other = "accuracy" if self.score == "r2" else "r2"
        values = {k: v for k, v in asdict(self).items() if not k.endswith(f"_{other}")}
        return json.dumps(values, allow_nan=False) + "\n"


def evaluate(
    model: nn.Module, x: Tensor | Inputs, y: Tensor, task: Task = CLASSIFICATION
) -> tuple[float, float]:
    """Mean loss and score of a task; the model's mode is as before afterwards."""
    loss = torch.zeros((), dtype=torch.float64)
    correct, count = torch.zeros((), dtype=torch.int64), 0
    size = min(EVALUATION_BATCH, EVALUATION_NUMBERS // max(math.prod(x.shape[1:]), 1))
    if task.each_step:
        size = min(size, EVALUATION_STEPS // y.shape[1])
    size = max(size, 1)
    with evaluating(model):
        for first in range(0, len(y), size):
            labels = y[first : first + size]
            output = model(x[first : first + size])
            counted = task.count(labels)
            loss.add_(task.loss(output, labels), alpha=counted)
            correct += task.correct(output, labels)
            count += counted
    mean = float(loss) / max(count, 1)
    return mean, task.scored(mean, int(correct), count, task.variance(y))


def versions() -> dict[str, str]:
    """The versions that a run was made with."""
    return {
        "rewire": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "kernels": _native.describe(),
    }

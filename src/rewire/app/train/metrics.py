"""What a run reports about itself."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from rewire import _native
from rewire._version import __version__
from rewire.nn.forward.modes import evaluating

EVALUATION_BATCH = 1000


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
    train_accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    connections: list[int]
    dropped: list[int]
    grown: list[int]
    turnover: list[float]
    seconds: float
    units: list[int] = field(default_factory=list)

    def to_line(self) -> str:
        """The line, with its line end."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy; the model's mode is as before afterwards."""
    loss = torch.zeros((), dtype=torch.float64)
    correct = torch.zeros((), dtype=torch.int64)
    with evaluating(model):
        for first in range(0, len(y), EVALUATION_BATCH):
            labels = y[first : first + EVALUATION_BATCH]
            logits = model(x[first : first + EVALUATION_BATCH])
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
    return float(loss) / len(y), int(correct) / len(y)


def versions() -> dict[str, str]:
    """The versions that a run was made with."""
    return {
        "rewire": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "kernels": _native.describe(),
    }

"""What a network is trained for: the loss, and the score that people look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rewire.app.data import Dataset
from rewire.app.data.dataset import IGNORED

__all__ = ["CLASSIFICATION", "Task"]


@dataclass(frozen=True)
class Task:
    """A loss and a score.

    Attributes:
        score: "accuracy", the share of labels that have the largest output; or "r2", the share of
            the targets' variance that the outputs explain (1 - squared error / variance).
        each_step: whether labels are (batch, steps), some of them `IGNORED`.
    """

    score: Literal["accuracy", "r2"] = "accuracy"
    each_step: bool = False

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy over labels (nats), or mean squared error over samples and targets."""
        if self.score == "r2":
            return F.mse_loss(output, y)
        if self.each_step:
            return F.cross_entropy(output.flatten(0, 1), y.flatten(), ignore_index=IGNORED)
        return F.cross_entropy(output, y)

    def count(self, y: Tensor) -> int:
        """How many labels, or samples of a regression, the mean of a loss is over."""
        return int((y != IGNORED).sum()) if self.each_step else len(y)

    def correct(self, output: Tensor, y: Tensor) -> Tensor:
        """How many labels are right; 0 in a regression. An int64 scalar."""
        if self.score == "r2":
            return torch.zeros((), dtype=torch.int64)
        return (output.argmax(-1) == y).sum()

    def variance(self, y: Tensor) -> float:
        """Mean variance of the targets of a regression; 1 for labels."""
        if self.score == "accuracy":
            return 1.0
        return float(y.double().var(0, correction=0).mean())

    def scored(self, loss: float, correct: int, count: int, variance: float) -> float:
        """The score, from sums over ``count`` labels or samples."""
        if self.score == "accuracy":
            return correct / max(count, 1)
        return 1.0 - loss / max(variance, 1e-12)


CLASSIFICATION = Task()


def task_of(dataset: Dataset) -> Task:
    """The task that a data set sets."""
    return Task("r2" if dataset.goal == "regression" else "accuracy", dataset.each_step)

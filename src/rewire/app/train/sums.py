"""What the steps of an epoch add up: the loss, the labels found, and how many there were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rewire.app.train.ranks import Ranks

__all__ = ["Sums"]


class Sums:
    """Sums over the labels (or the samples of a regression) of an epoch so far.

    Loss and labels found stay tensors: reading a number each step would cost more than keeping it.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin an epoch."""
        self.loss = torch.zeros((), dtype=torch.float64)
        self.correct = torch.zeros((), dtype=torch.int64)
        self.count = 0

    def add(self, loss: Tensor, count: int, correct: Tensor | None) -> None:
        """A step with the mean ``loss`` over ``count`` labels, of which ``correct`` were found."""
        self.loss.add_(loss, alpha=count)
        if correct is not None:
            self.correct.add_(correct)
        self.count += count

    @property
    def mean_loss(self) -> float:
        """0 where there was no label yet."""
        return float(self.loss) / max(self.count, 1)

    def over(self, ranks: Ranks) -> Sums:
        """The sums of all ranks."""
        whole = Sums()
        whole.loss, whole.correct = self.loss.clone(), self.correct.clone()
        count = torch.tensor(self.count)
        ranks.sum(whole.loss, whole.correct, count)
        whole.count = int(count)
        return whole

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"loss_sum": self.loss, "correct": self.correct, "count": self.count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state` gave."""
        self.loss, self.correct = state["loss_sum"], state["correct"]
        self.count = int(state["count"])

"""What a method is told about a training, for hyper-parameters that depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Run", "suited_l1"]

#: What L1 takes off in a whole run, in steps of the learning rate, and its most in one step.
_IN_ALL, _AT_ONCE = 150.0, 0.1


class Run(NamedTuple):
    """A training: its epochs, the name of its optimizer ("adam", "sgd", ...), and its optimizer
    steps, None where the data are not known yet.
    """

    epochs: int
    optimizer: str
    steps: int | None = None


def suited_l1(run: Run, given: Mapping[str, Any]) -> dict[str, float]:
    """The L1 coefficient for optimizers whose steps have about one length, whatever the gradient.

    Adam moves a connection by about the rate in each step while its gradients agree, and by little
    while they do not. L1 takes off its share of the rate, 0.1: connections whose gradients agree
    less than that die. Runs of more than 1,500 steps take less at once and as much in all
    (docs/defaults.md).
    """
    if run.optimizer not in ("adam", "adamw", "rmsprop") or "l1" in given:
        return {}
    return {"l1": _AT_ONCE if run.steps is None else min(_AT_ONCE, _IN_ALL / run.steps)}

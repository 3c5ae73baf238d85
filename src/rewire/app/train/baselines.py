"""Dense networks to compare with: the whole one, and one with as few parameters as the sparse one.

They are chosen like methods, and do nothing to a network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rewire import methods
from rewire.app.errors import TrainError
from rewire.methods import Method, MethodInfo

__all__ = ["BASELINES", "DENSE", "SMALL_DENSE", "available", "info", "largest_width"]

DENSE, SMALL_DENSE = "dense", "small-dense"


class Dense(Method):
    """Ordinary training of a dense network."""

    starts_dense = True


def _entry(name: str, summary: str, budget: str, guarantee: str) -> MethodInfo:
    return MethodInfo(
        name,
        Dense,
        "baseline",
        summary,
        keeps_budget=budget,
        memory="O(M)",
        guarantees=(guarantee,),
    )


#: The dense networks by name.
BASELINES = {
    DENSE: _entry(
        DENSE,
        "the dense network, for comparison: every connection trains",
        "no",
        "no connection is dropped",
    ),
    SMALL_DENSE: _entry(
        SMALL_DENSE,
        "for comparison: a narrower dense network with as many parameters as the sparse one",
        "at most",
        "no more parameters than the sparse network",
    ),
}


def available() -> list[str]:
    """Names of all methods and of both dense networks, sorted."""
    return sorted([*methods.available(), *BASELINES])


def info(name: str) -> MethodInfo:
    """What is known of a method or dense network; ValueError as `rewire.methods.info`."""
    return BASELINES[name] if name in BASELINES else methods.info(name)


def create(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: object
) -> Method:
    """As `rewire.methods.create`."""
    if name in BASELINES:
        return Dense(model, optimizer)
    return methods.create(name, model, optimizer, **settings)


def largest_width(make: Callable[[float], nn.Module], parameters: int) -> float:
    """The largest factor on the units of hidden layers, up to 1, with at most so many parameters.

    ``make`` builds the network of a factor. Raises TrainError if none is small enough.
    """

    def size(width: float) -> int:
        with torch.random.fork_rng(devices=[]):
            return sum(p.numel() for p in make(width).parameters())

    low, high = 0.0, 1.0
    if size(high) <= parameters:
        return high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= parameters else (low, middle)
    if low == 0.0:
        raise TrainError(
            f"--method small-dense: even with layers of one unit the network has "
            f"{size(1e-6):,} parameters, more than the {parameters:,} of the sparse one: choose a "
            "larger --density"
        )
    return low

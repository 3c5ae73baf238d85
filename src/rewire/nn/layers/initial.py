"""Initial values of sparse weights: how large they are for the inputs that a neuron has."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch

from rewire.nn.weight.pool import SparseWeight

__all__ = ["INITS", "Init", "check_init", "draw_values"]

#: Of how many inputs the first values of a weight are drawn: see `draw_values`.
Init: TypeAlias = Literal["auto", "dense", "sparse"]
INITS: tuple[Init, ...] = get_args(Init)


def check_init(init: str) -> None:
    """ValueError with what is allowed if ``init`` is none of `INITS`."""
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, not {init!r}")


@torch.no_grad()
def draw_values(
    weight: SparseWeight, bound: float, init: Init, generator: torch.Generator | None
) -> None:
    """Draw U(-b, b) for every connection; ``bound`` is b of the dense twin, whose rows have
    ``cols`` connections.

    init:
        "auto": b = bound sqrt(cols / n) in a row of n connections. A neuron then has the variance
        that it has in the
            dense twin, whatever the density, so signals reach the last layer of a deep network and
            gradients the first one. At density 1 it is the dense twin's.
        "dense": b = bound. Signals shrink by the square root of the density in every layer.
        Connections are small
            beside what a step of training adds, so that those which no gradient moves (on pixels
            that are always 0) are soon the weakest, and rewired: right for long training at the
            settings of DEEP R's authors.
        "sparse": as "auto" with the mean number of connections of a row, of at least 1, for all
        rows.
    """
    check_init(init)
    rows, cols = weight.matrix_shape
    if init == "dense":
        weight.values.uniform_(-bound, bound, generator=generator)
    elif init == "sparse":
        bound *= math.sqrt(cols / max(weight.connections / rows, 1))
        weight.values.uniform_(-bound, bound, generator=generator)
    else:
        bounds = bound * (cols / weight.fan_in().clamp(min=1)).sqrt().to(weight.dtype)
        weight.values.uniform_(-1.0, 1.0, generator=generator).mul_(
            bounds[weight.rows.long().clamp(min=0)]
        )
    weight.values.masked_fill_(weight.rows < 0, 0.0)

"""Initial values of sparse weights: how large they are, given the number of inputs."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch

from rewire.nn.weight.pool import SparseWeight

__all__ = ["INITS", "Init", "check_init", "draw_values"]

#: The number of inputs that first values are drawn for: see `draw_values`.
Init: TypeAlias = Literal["auto", "dense", "sparse"]
INITS: tuple[Init, ...] = get_args(Init)


def check_init(init: str) -> None:
    """Raise ValueError unless ``init`` is one of `INITS`."""
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, not {init!r}")


@torch.no_grad()
def draw_values(
    weight: SparseWeight, bound: float, init: Init, generator: torch.Generator | None
) -> None:
    """Draw U(-b, b) for every connection, where b follows from ``bound``, the b of the dense twin,
    whose rows have ``cols`` connections each.

    Args:
        init: "auto": b = bound sqrt(cols / n) in a row of n connections. An output then has the
            variance that it has in the dense twin, whatever the density, so signals reach the last
            layer of a deep network, and gradients the first. "dense": b = bound. Signals shrink by
            the square root of the density in every layer. Values are small compared to what
            training adds in a step, so connections without a gradient (of pixels that are always 0)
            soon are the weakest and get replaced: good for long training with the settings of DEEP
            R's authors. "sparse": as "auto", with the mean number of connections of a row (at least
            1) for all rows.
        generator: draws; torch's default generator otherwise.

    Raises ValueError for another ``init``.
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

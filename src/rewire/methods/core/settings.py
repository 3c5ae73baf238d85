"""What methods share in checking hyper-parameters: choices, and numbers that may differ between
layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from rewire.methods.core.base import Pool
from rewire.schedules import Schedule, checked

__all__ = ["PerLayer", "choice", "named_globs", "needs_data", "per_layer"]

#: One number (or schedule) for all layers, a list of them in the model's order, or a dict from glob
#: pattern to them.
PerLayer: TypeAlias = float | Schedule | Sequence[float | Schedule] | Mapping[str, float | Schedule]


def choice(name: str, given: str, allowed: Sequence[str]) -> None:
    """ValueError with what is allowed if ``given`` is not."""
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {given!r}")


def named_globs(pools: Sequence[Pool], patterns: Sequence[str], what: str) -> list[str]:
    """The first of ``patterns`` that fits each pool's name (``"fc1.weight"``) or that of its layer
    (``"fc1"``).

    Raises ValueError for a pattern that fits no pool and for a pool that no pattern fits.
    """
    names = [(pool.name, pool.name.rpartition(".")[0]) for pool in pools]
    known = ", ".join(pool.name for pool in pools)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for both in names for name in both if name):
            raise ValueError(f"{what}: no sparse weight fits {pattern!r}; there are {known}")
    found = []
    for both in names:
        fits = [p for p in patterns if any(fnmatchcase(name, p) for name in both if name)]
        if not fits:
            raise ValueError(
                f"{what} says nothing of {both[0]}: add it, or '*' as the last pattern"
            )
        found.append(fits[0])
    return found


def per_layer(
    name: str, given: PerLayer, pools: Sequence[Pool], low: float, high: float = math.inf
) -> list[float | Schedule]:
    """``given`` for each of ``pools``, every number (a schedule: its first) checked to lie in [low,
    high].

    Raises ValueError for a list of another length, patterns that fit nothing, layers left out,
    numbers out of range.
    """
    if isinstance(given, Mapping):
        chosen = named_globs(pools, list(given), name)
        return [
            checked(f"{name} of {p.name}", given[g], low, high)
            for p, g in zip(pools, chosen, strict=True)
        ]
    if isinstance(given, Sequence):
        if len(given) != len(pools):
            names = ", ".join(pool.name for pool in pools)
            raise ValueError(
                f"{name} is a list of {len(given)} for {len(pools)} sparse weights: give one "
                "number for all, or one "
                f"for each, in the model's order ({names})"
            )
        return [
            checked(f"{name} of {p.name}", v, low, high) for p, v in zip(pools, given, strict=True)
        ]
    return [checked(name, given, low, high)] * len(pools)


def needs_data(method: object) -> ValueError:
    """The error of a method that was made without ``data=``."""
    return ValueError(
        f"{type(method).__name__} looks at activations: give it data=, batches of training inputs"
    )

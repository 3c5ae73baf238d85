"""Which connections to drop: small pure criteria, plugged into a `rewire.methods.Rewirer`.

A criterion is a callable ``(pool, fraction) -> slots``: int64, distinct, active. It reads the pool in (row, col) order,
so ties never depend on a slot's history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rewire.methods.base import Pool

__all__ = ["Drop", "Magnitude", "MagnitudeBySign", "smallest"]


class Drop(Protocol):
    """Chooses the connections of one pool to drop."""

    def __call__(self, pool: Pool, fraction: float) -> Tensor:
        """Slots (int64) of about ``fraction`` of the active connections."""
        ...


def smallest(slots: Tensor, score: Tensor, count: int) -> Tensor:
    """The ``count`` slots of lowest score; among equals the first of ``slots``."""
    return slots[torch.sort(score, stable=True).indices[:count]]


@dataclass(frozen=True)
class Magnitude:
    """The ``floor(fraction * K)`` connections of smallest magnitude."""

    def __call__(self, pool: Pool, fraction: float) -> Tensor:
        slots = pool.weight.active()
        return smallest(slots, pool.weight.values[slots].abs(), int(fraction * slots.numel()))


@dataclass(frozen=True)
class MagnitudeBySign:
    """SET's rule: ``floor(fraction * n)`` of the n smallest positive and of the n largest negative weights.

    A weight that is exactly 0 counts as the smallest of the positive ones.
    """

    def __call__(self, pool: Pool, fraction: float) -> Tensor:
        slots = pool.weight.active()
        values = pool.weight.values[slots]
        chosen = []
        for side in (values >= 0, values < 0):
            own = slots[side]
            chosen.append(smallest(own, values[side].abs(), int(fraction * own.numel())))
        return torch.cat(chosen)

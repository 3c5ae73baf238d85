"""Which positions have ever been active."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewire.methods.core.pool import Pool

__all__ = ["EverActive"]


class EverActive:
    """The flat positions of each pool that have ever been active: sorted, 8 bytes each."""

    def __init__(self, known: bool = True) -> None:
        self.known = known  # whether they are kept at all
        self.ever: dict[str, Tensor] = {}

    def begin(self, pools: Sequence[Pool]) -> None:
        """Count what is active in pools that are not known yet."""
        for pool in pools:
            if self.known and pool.name not in self.ever:
                self.ever[pool.name] = pool.keys(pool.weight.active())

    def add(self, pool: Pool, slots: Tensor) -> None:
        """Count the connections in ``slots``. Cost: O(n log n) for n positions known."""
        if self.known:
            self.ever[pool.name] = torch.cat([self.ever[pool.name], pool.keys(slots)]).unique()

    def stats(self, pools: Sequence[Pool]) -> dict[str, float]:
        """`share` as "explored", if they are kept."""
        return {"explored": self.share(pools)} if self.known else {}

    def share(self, pools: Sequence[Pool]) -> float:
        """Positions that have ever been active, over all (allowed) positions."""
        known = [
            self.ever[p.name].numel() if p.name in self.ever else p.weight.connections
            for p in pools
        ]
        return sum(known) / sum(pool.weight.positions for pool in pools)

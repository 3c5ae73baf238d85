"""Budget that moves between layers: which layer grows how many of what was dropped all over the
network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from rewire.methods.core.base import Pool

__all__ = ["Share", "spread", "survivors"]

#: How much of the connections dropped all over the network a pool grows, in proportion: ``(pool,
#: dropped slots)`` to a number of at least 0, asked before anything changes.
Share: TypeAlias = Callable[[Pool, Tensor], float]


def survivors(pool: Pool, dropped: Tensor) -> float:
    """In proportion to the connections that are left (DSR)."""
    return float(pool.weight.connections - dropped.numel())


def spread(total: int, shares: Sequence[float], room: Sequence[int]) -> list[int]:
    """``total`` as whole numbers in proportion to ``shares``, each at most ``room``; the sum is
    exact.

    What does not fit goes to the others in proportion, fractions to the largest remainders (ties:
    the first). Where all shares left are 0 (or not finite), room counts instead. Raises ValueError
    if there is no room for ``total``.
    """
    if total > sum(room):
        raise ValueError(f"{total} connections do not fit where there is room for {sum(room)}")
    counts, left = [0] * len(room), total
    while left:
        free = [r - c for r, c in zip(room, counts, strict=True)]
        open_ = [
            s if f and 0 < s < float("inf") else 0.0 for s, f in zip(shares, free, strict=True)
        ]
        if not sum(open_):
            open_ = [float(f) for f in free]
        exact = [left * s / sum(open_) for s in open_]
        # full: the others share what these leave
        if any(f and e >= f for e, f in zip(exact, free, strict=True)):
            given = [f if e >= f else 0 for e, f in zip(exact, free, strict=True)]
        else:
            given = [int(e) for e in exact]
            order = sorted(
                (i for i, f in enumerate(free) if f), key=lambda i: (given[i] - exact[i], i)
            )
            for i in order[: left - sum(given)]:
                given[i] += 1
        counts = [c + g for c, g in zip(counts, given, strict=True)]
        left -= sum(given)
    return counts

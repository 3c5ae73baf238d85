"""What followers of a pool are told when it changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from rewire.nn.weight.pool import SparseWeight

__all__ = ["Event", "Follower"]


@dataclass(frozen=True)
class Event:
    """One change of a pool.

    weight: the pool, already changed.
    slots: int64, slots that hold another connection than before, or are empty now; numbers kept
        for each connection start afresh there.
    source: None, or int64 of length capacity: everything moved, and slot k now holds what slot
        ``source[k]`` held (-1: nothing). ``slots`` then counts in the new order.
    loaded: whether the pool was replaced from a state_dict. Whoever loads the pool then also loads
        what is saved elsewhere for each connection (an optimizer's state), before or after.
    """

    weight: SparseWeight
    slots: Tensor
    source: Tensor | None = None
    loaded: bool = False


class Follower(Protocol):
    """Anything that keeps one number or more per slot and must move with the connections."""

    def __call__(self, event: Event) -> None:
        """Bring per-slot state in line with ``event.weight``."""
        ...

"""State that a method keeps for every slot of every pool, beside the values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rewire.methods.core.pool import Pool
from rewire.nn import Event, Follower

__all__ = ["PerSlot"]

#: The state of a pool's slots, or of some of them: ``(pool, slots or None) -> tensor``.
Fresh = Callable[[Pool, Tensor | None], Tensor]


class PerSlot:
    """One number for every slot of every pool, (capacity,), through rewirings, moves and loading.

    ``fresh(pool, slots)`` says what a new connection in ``slots`` begins with; with None for
    ``slots``, what all slots have after a state was loaded and at the start. Numbers move along
    when slots do. Cost: O(changed slots) per change.
    """

    def __init__(self, pools: Sequence[Pool], fresh: Fresh) -> None:
        self._pools, self._fresh = pools, fresh
        self._kept = [fresh(pool, None) for pool in pools]

    def __getitem__(self, number: int) -> Tensor:
        return self._kept[number]

    def __setitem__(self, number: int, kept: Tensor) -> None:
        self._kept[number] = kept

    def read(self) -> None:
        """Begin all slots afresh."""
        self._kept = [self._fresh(pool, None) for pool in self._pools]

    def changed(self, number: int, event: Event) -> None:
        """Follow a change of pool ``number``."""
        pool = self._pools[number]
        if event.loaded:
            self._kept[number] = self._fresh(pool, None)
            return
        if event.source is not None:
            moved = self._kept[number][event.source.clamp(min=0)]
            self._kept[number] = torch.where(event.source >= 0, moved, torch.ones_like(moved))
        self._kept[number][event.slots] = self._fresh(pool, event.slots)

    def follower(self, number: int) -> Follower:
        """A follower of pool ``number`` that does not keep this object alive."""
        here = weakref.ref(self)

        def follow(event: Event) -> None:
            kept = here()
            if kept is not None:
                kept.changed(number, event)

        return follow

"""The signs of connections, slot by slot: what DEEP R and soft-DEEP R keep beside the values."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from rewire import topology
from rewire.methods.core.base import Pool, Purpose
from rewire.nn import Event

__all__ = ["SlotSigns", "current_signs", "neuron_signs", "position_signs", "signed"]


def current_signs(pool: Pool, slots: Tensor | None = None) -> Tensor:
    """Signs (int8) of all slots, or of ``slots``: the sign bits of their values."""
    values = pool.weight.values.detach()
    return 1 - 2 * torch.signbit(values if slots is None else values[slots]).to(torch.int8)


def position_signs(pool: Pool, rows: Tensor, cols: Tensor, seed: int) -> Tensor:
    """The sign (int8) that each position of the pool has for good under ``seed``."""
    return topology.position_signs(rows, cols, seed, pool.stream(Purpose.SIGN))


def neuron_signs(pool: Pool, cols: Tensor, seed: int) -> Tensor:
    """The sign (int8) of the neuron that each connection of these columns leaves, under ``seed``.

    A neuron is a column; of a convolution an input channel, whose kernel has many columns.
    """
    neuron = cols.long() // math.prod(pool.weight.shape[2:])
    return topology.position_signs(
        torch.zeros_like(neuron), neuron, seed, pool.stream(Purpose.SIGN)
    )


def signed(theta: Tensor, sign: Tensor) -> Tensor:
    """``sign * theta`` for theta >= 0; a zero gets the sign bit, so that signs are saved with the
    values.
    """
    return torch.copysign(theta, sign.to(theta.dtype))


class SlotSigns:
    """The sign of every slot of every pool, int8, through rewirings, moves and loading.

    Between the optimizer's step and the method's a value may lie across zero, so signs cannot be
    read off the values then; they are read when a slot gets a new connection, and carried when
    slots move. One byte per slot.
    """

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = pools
        self._signs = [current_signs(pool) for pool in pools]

    def __getitem__(self, number: int) -> Tensor:
        return self._signs[number]

    def __setitem__(self, number: int, signs: Tensor) -> None:
        self._signs[number] = signs

    def read(self) -> None:
        """Read all signs off the values again, after a state was loaded."""
        self._signs = [current_signs(pool) for pool in self._pools]

    def changed(self, number: int, event: Event) -> None:
        """Bring the signs of pool ``number`` in line with what happened to it."""
        pool = self._pools[number]
        if event.loaded:
            self._signs[number] = current_signs(pool)
            return
        if event.source is not None:
            moved = self._signs[number][event.source.clamp(min=0)]
            self._signs[number] = torch.where(event.source >= 0, moved, torch.ones_like(moved))
        self._signs[number][event.slots] = current_signs(pool, event.slots)

    def follower(self, number: int) -> _Teller:
        """A follower of pool ``number`` that does not keep these signs alive."""
        return _Teller(self, number)


class _Teller:
    def __init__(self, signs: SlotSigns, number: int) -> None:
        self._signs, self._number = weakref.ref(signs), number

    def __call__(self, event: Event) -> None:
        signs = self._signs()
        if signs is not None:
            signs.changed(self._number, event)

"""The signs of connections, slot by slot: what DEEP R and soft-DEEP R keep beside the values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rewire import topology
from rewire.methods.core.base import Pool, Purpose

__all__ = ["current_signs", "neuron_signs", "position_signs", "signed"]


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

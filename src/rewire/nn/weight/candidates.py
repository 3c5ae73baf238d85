"""Dormant connections on trial, as zeros beside a weight's own values, for one step or a few."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from rewire import topology

if TYPE_CHECKING:
    from rewire.nn.weight.pool import SparseWeight

__all__ = ["Candidates"]


class Candidates:
    """Zero-valued connections that a layer computes along with its own, so that autograd gives
    their gradients.

    While ``weight.candidates`` is set, `SparseWeight.operand` hands layers the values with zeros
    behind them, and the index of both together. Outputs stay the same, and every layer type,
    autocast, GradScaler, DDP and compiled graphs work as usual, because nothing else depends on the
    candidates. They vanish when the weight changes.

    Args:
        weight: the weight.
        rows, cols: int64, (n,), distinct and dormant; raises `TopologyError` otherwise.

    Attributes:
        probe: a leaf of zeros, (capacity + n,), added to values and candidates. Its gradient,
            summed over backward passes, is that of all connections, unclipped and in one scale. The
            gradient that the optimizer sees is of active connections only, and may have been
            unscaled or clipped. Whoever sets the candidates reads it.

    Cost: O((K + n) log (K + n)) time once and O(K + n) memory; products cost as much as with K + n
    connections.
    """

    def __init__(self, weight: SparseWeight, rows: Tensor, cols: Tensor) -> None:
        topology.check_integers(rows=rows, cols=cols)
        self.rows, self.cols = rows, cols
        self.count = rows.numel()
        shape = weight.matrix_shape
        kind = topology.index_dtype(*shape, weight.capacity + self.count)
        all_rows = torch.cat([weight.rows.to(kind), rows.to(kind)])
        all_cols = torch.cat([weight.cols.to(kind), cols.to(kind)])
        self.index = topology.build_index(all_rows, all_cols, *shape)
        size = weight.capacity + self.count
        self.probe = torch.zeros(size, dtype=weight.dtype, device=weight.device, requires_grad=True)

    def values(self, own: Tensor) -> Tensor:
        """The weight's values ``own`` (capacity,) with the candidates' zeros behind: (capacity +
        n,).
        """
        return F.pad(own, (0, self.count)) + self.probe

    def spoil(self) -> None:
        """Let graphs that were recorded with these candidates raise on backward."""
        increment_version([self.probe.detach(), *self.index])

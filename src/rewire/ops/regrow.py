"""DEEP R's exchange of connections over one pool: dormant ones drawn, signed and put where others went."""

from __future__ import annotations

import torch
from torch import Tensor

from rewire import _native, random, topology
from rewire.topology import Index

__all__ = ["regrow_"]


def regrow_(
    values: Tensor,
    signs: Tensor,
    rows: Tensor,
    cols: Tensor,
    index: Index,
    slots: Tensor,
    *,
    seed: int,
    step: int,
    grow_stream: int,
    sign_stream: int,
    fixed: bool,
) -> int:
    """Put new connections into ``slots`` (int64, distinct, active), in place; return K afterwards.

    They are drawn by `rewire.topology.sample_dormant` from stream ``grow_stream``, get the sign of their position
    (`rewire.topology.position_signs`; ``fixed``) or a new one, bit 0 of `rewire.random.bits`, from ``sign_stream``, and
    start at a zero of that sign. values (C,) float; signs (C,) int8; rows, cols and the index as in `rewire.topology`.
    Raises `TopologyError` (nothing changed) on a bad slot. Costs what `rewire.topology.replace_` does.
    """
    topology.check_integers(slots=slots)
    n_rows, n_cols = index.row_ptr.shape[0] - 1, index.col_ptr.shape[0] - 1
    if _native.available("regrow_") and values.is_cpu and values.dtype in (torch.float32, torch.float64):
        result = torch.ops.rewire.regrow_(
            values, signs, rows, cols, *index, slots, seed, step, grow_stream, sign_stream, fixed
        )
        topology.raise_problem(result, rows, cols, n_rows, n_cols, rows.numel())
        return int(result[1])
    topology.check_slots(slots, rows.numel())
    new_rows, new_cols = topology.sample_dormant(
        index, n_rows, n_cols, slots.numel(), rows[slots].long(), cols[slots].long(), seed, step, grow_stream
    )
    if fixed:
        sign = topology.position_signs(new_rows, new_cols, seed, sign_stream)
    else:
        counter = torch.arange(slots.numel(), device=rows.device)
        sign = (1 - 2 * (random.bits(seed, step, sign_stream, counter) & 1)).to(torch.int8)
    connections = topology.replace_(rows, cols, index, n_rows, n_cols, slots, new_rows, new_cols)
    signs[slots] = sign
    values[slots] = torch.copysign(torch.zeros((), dtype=values.dtype, device=values.device), sign)
    return connections

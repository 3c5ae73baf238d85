"""DEEP R over one pool: replace connections by random dormant ones, or make a whole step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewire import _native, random, topology
from rewire.ops.langevin import langevin_step_
from rewire.topology import Index
from rewire.topology.index import OK

__all__ = ["regrow_", "walk_and_regrow_"]


#: Looked up once, because that takes as long as the step of a small pool.
_WALK: Any = (
    torch.ops.rewire.walk_and_regrow_.default if _native.available("walk_and_regrow_") else None
)


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

    The connections are drawn by `rewire.topology.sample_dormant` from stream ``grow_stream``. With
    ``fixed`` each gets the sign of its position (`rewire.topology.position_signs`), else a new one,
    bit 0 of `rewire.random.bits`, both from ``sign_stream``. Its value is a zero of that sign.

    values: (C,) float. signs: (C,) int8. rows, cols and index: as in `rewire.topology`. Raises
    `TopologyError` on a bad slot, with nothing changed, or if rows and cols are not a topology.
    Costs what `rewire.topology.replace_` does.
    """
    topology.check_integers(slots=slots)
    n_rows, n_cols = index.row_ptr.shape[0] - 1, index.col_ptr.shape[0] - 1
    if (
        _native.available("regrow_")
        and values.is_cpu
        and values.dtype in (torch.float32, torch.float64)
    ):
        result = torch.ops.rewire.regrow_(
            values, signs, rows, cols, *index, slots, seed, step, grow_stream, sign_stream, fixed
        )
        topology.raise_problem(result, rows, cols, n_rows, n_cols, rows.numel())
        return int(result[1])
    topology.check_slots(slots, rows.numel())
    new_rows, new_cols = topology.sample_dormant(
        index,
        n_rows,
        n_cols,
        slots.numel(),
        rows[slots].long(),
        cols[slots].long(),
        seed,
        step,
        grow_stream,
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


def walk_and_regrow_(
    values: Tensor,
    signs: Tensor,
    rows: Tensor,
    cols: Tensor,
    index: Index,
    gradient: Tensor | None,
    shrink: float,
    noise: float,
    *,
    seed: int,
    step: int,
    noise_stream: int,
    grow_stream: int,
    sign_stream: int,
    fixed: bool,
) -> Tensor:
    """`langevin_step_`, and `regrow_` in the slots that crossed zero; returns those slots.

    One call for all that DEEP R does in a step to a pool whose budget is its own. gradient: None,
    or like values; set to 0 in the slots that crossed. Other arguments, results and errors as in
    the two functions. With no noise and no slot crossing, only values and signs are read.
    """
    if (
        _WALK is not None
        and values.is_cpu
        and values.dtype in (torch.float32, torch.float64)
        and (gradient is None or (gradient.dtype == values.dtype and gradient.is_contiguous()))
    ):
        streams = (noise_stream, grow_stream, sign_stream)
        slots, code, a, b = _WALK(
            values, signs, rows, cols, *index, gradient, shrink, noise, seed, step, *streams, fixed
        )
        if code != OK:
            n_rows, n_cols = index.row_ptr.shape[0] - 1, index.col_ptr.shape[0] - 1
            topology.raise_problem((code, a, b), rows, cols, n_rows, n_cols, rows.numel())
        crossed: Tensor = slots
        return crossed
    crossed = langevin_step_(values, rows, signs, shrink, noise, seed, step, noise_stream)
    if crossed.numel():
        drawn = {"seed": seed, "step": step, "grow_stream": grow_stream, "sign_stream": sign_stream}
        regrow_(values, signs, rows, cols, index, crossed, fixed=fixed, **drawn)
        if gradient is not None:
            gradient.index_fill_(0, crossed, 0.0)
    return crossed

"""The best of many scores and the weakest of many values, without sorting: for drop and grow
criteria.

On the CPU, in float32 and float64, native kernels give the same bits as the plain PyTorch here, on
any number of threads. Of equal numbers the first are chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rewire import _native, random
from rewire.topology import Index

__all__ = ["Draw", "above", "above_drawn", "extremes", "uniforms", "weakest"]

_NATIVE = _native.available("above")
_DTYPES = (torch.float32, torch.float64)


class Draw(NamedTuple):
    """Which random numbers a draw uses (`rewire.random`), and what the smallest scores count as."""

    seed: int
    step: int
    stream: int
    least: float


def uniforms(draw: Draw, positions: Tensor) -> Tensor:
    """A random number in (0, 1] for each of ``positions`` (int64 >= 0, (n,)); float32, (n,).

    A number depends on the draw and its position alone. It is (word + 1/2) / 2**32, rounded; one
    call of the generator gives the 32-bit words of four positions.
    """
    if _NATIVE and positions.is_cpu:
        drawn: Tensor = torch.ops.rewire.uniforms(
            positions, draw.seed, draw.step & 0xFFFFFFFF, draw.stream
        )
        return drawn
    quads = positions // 4
    words = random.words(
        draw.seed, quads & 0xFFFFFFFF, quads >> 32, draw.step & 0xFFFFFFFF, draw.stream
    )
    return (
        torch.stack(words, 1).gather(1, positions.view(-1, 1) % 4).flatten().float() + 0.5
    ) * 2.0**-32


def above(
    scores: Tensor,
    first_row: int,
    index: Index,
    kept: Tensor,
    threshold: float,
    *,
    absolute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Keys (row * cols + col, int64, ascending) and scores of the positions that score above
    ``threshold``.

    Args:
        scores: (t, cols), of the rows from ``first_row`` on; their magnitudes count if
            ``absolute``. NaN and -inf count as the lowest finite number.
        index: of the pool.
        kept: bool, (capacity,); positions of slots with True are left out.
        threshold: a number of the scores' dtype, or -inf.

    One pass, O(t cols) time and memory. Raises RuntimeError on a bad index.
    """
    lists = index.row_ptr, index.row_cols, index.row_slots
    if _NATIVE and scores.is_cpu and scores.dtype in _DTYPES:
        keys, found = torch.ops.rewire.above(scores, first_row, *lists, kept, threshold, absolute)
        return keys, found
    values = scores.abs() if absolute else scores.clone()
    lowest = torch.finfo(values.dtype).min
    values = torch.nan_to_num(values, nan=lowest, posinf=torch.inf, neginf=lowest)
    _strike_out(values, first_row, index, kept)
    at = (values > max(threshold, -torch.inf)).flatten().nonzero().flatten()
    return at + first_row * scores.shape[1], values.flatten()[at]


def above_drawn(
    scores: Tensor, first_row: int, index: Index, kept: Tensor, threshold: float, draw: Draw
) -> tuple[Tensor, Tensor, Tensor]:
    """As `above`, for a draw in proportion to scores: positions where s / e may exceed
    ``threshold``.

    s is the magnitude of the score, at least ``draw.least`` (also for NaN), u the position's number
    from `uniforms`, which is returned as well (float32), and e = -log(1 - u) an exponential number.
    Since u <= e, every position with s / e > threshold has ``s >= c * threshold * u``, where c = 1
    - 2**-20 makes up for rounding; the positions returned are those.
    """
    lists = index.row_ptr, index.row_cols, index.row_slots
    factor = threshold * (1.0 - 2.0**-20)
    if _NATIVE and scores.is_cpu and scores.dtype in _DTYPES:
        keys, found, drawn = torch.ops.rewire.above_drawn(
            scores, first_row, *lists, kept, factor, draw.least, draw.seed, draw.step, draw.stream
        )
        return keys, found, drawn
    values = torch.nan_to_num(scores.abs(), nan=0.0, posinf=torch.inf).clamp_(min=draw.least)
    _strike_out(values, first_row, index, kept)
    at = (values > -torch.inf).flatten().nonzero().flatten()
    keys = at + first_row * scores.shape[1]
    u, found = uniforms(draw, keys), values.flatten()[at]
    may = found >= torch.tensor(factor, dtype=found.dtype) * u.to(found.dtype)
    return keys[may], found[may], u[may]


def _strike_out(values: Tensor, first_row: int, index: Index, kept: Tensor) -> None:
    """Put -inf at the kept positions."""
    ptr = index.row_ptr[first_row : first_row + values.shape[0] + 1].long()
    low, high = int(ptr[0].item()), int(ptr[-1].item())
    row = torch.repeat_interleave(torch.arange(values.shape[0], device=ptr.device), ptr.diff())
    stays = kept[index.row_slots[low:high].long()]
    values[row[stays], index.row_cols[low:high].long()[stays]] = -torch.inf


def extremes(scores: Tensor, count: int, *, largest: bool) -> Tensor:
    """Places (int64, ascending) of the ``count`` largest or smallest of 1-D ``scores``; of equal
    ones the first.

    NaN comes last in both. Raises RuntimeError unless 0 <= count <= scores. O(scores) time.
    """
    if _NATIVE and scores.is_cpu and scores.dtype in _DTYPES:
        places: Tensor = torch.ops.rewire.extremes(scores, count, largest)
        return places
    if not 0 <= count <= scores.numel():
        raise RuntimeError(f"count must be between 0 and {scores.numel()}, not {count}")
    if count in (0, scores.numel()):
        return torch.arange(count, device=scores.device)
    nan = scores.isnan()
    ranks = torch.where(nan, torch.zeros_like(scores), -scores if largest else scores)
    if int((~nan).sum()) < count:
        last = nan & (nan.cumsum(0) <= count - int((~nan).sum()))
        return (~nan | last).nonzero().flatten()
    ranks = torch.where(nan, torch.full_like(ranks, torch.inf), ranks)
    threshold = ranks.kthvalue(count).values
    below, level = (ranks < threshold) & ~nan, (ranks == threshold) & ~nan
    return (below | (level & (level.cumsum(0) <= count - below.sum()))).nonzero().flatten()


def weakest(
    values: Tensor,
    slots: Tensor,
    fraction: float,
    *,
    by_sign: bool = False,
    factors: Tensor | None = None,
) -> Tensor:
    """``floor(fraction n)`` of the n ``slots`` (int), in their order: those of smallest
    ``abs(values factors)``; int64.

    Args:
        values, factors: (capacity,).
        by_sign: take the same share of the slots with a number of at least 0, and then of those
            below; NaN belongs to neither.

    Raises RuntimeError for a bad slot. O(slots) time and memory.
    """
    native = _NATIVE and values.is_cpu and values.dtype in _DTYPES
    if native and (factors is None or factors.dtype == values.dtype):
        chosen: Tensor = torch.ops.rewire.weakest(values, factors, slots, fraction, by_sign)
        return chosen
    slots = slots.long()
    score = values[slots] if factors is None else values[slots] * factors[slots]
    sides = [score >= 0, score < 0] if by_sign else [torch.ones_like(score, dtype=torch.bool)]
    parts = []
    for side in sides:
        own = slots[side]
        parts.append(own[extremes(score[side].abs(), int(fraction * own.numel()), largest=False)])
    return torch.cat(parts)

"""Which connections exist: index algebra over pools of slots. Knows no weights and no autograd.

A pool describes a rows x cols matrix by two integer tensors of length C: slot k holds the
connection ``(rows[k], cols[k])`` or is empty (both -1). All functions take O(K + rows + cols)
memory at most; none allocates rows x cols. The plain PyTorch code here is the definition and runs
on any device; on the CPU it dispatches to native twins (``torch.ops.rewire.*``) with bit-identical
results:

==================================  ==============================================================
``distinct``                        `rewire.random.distinct`
``build_index_``                    `build_index` into given tensors
``replace_``                        `replace_`: validate, rewrite slots, merge or rebuild the lists
``sample_dormant``                  `sample_dormant`
``sample_dormant_in_rows``          `sample_dormant_in_rows`
``candidates``                      `candidates`
``position_signs``                  `position_signs`
==================================  ==============================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rewire import _native, random

__all__ = [
    "Index",
    "TopologyError",
    "build_index",
    "candidates",
    "check_integers",
    "check_slots",
    "empty_index",
    "fingerprint",
    "index_dtype",
    "matrix_size",
    "position_signs",
    "raise_problem",
    "replace_",
    "sample",
    "sample_dormant",
    "sample_dormant_in_rows",
    "sample_in_rows",
]


class TopologyError(ValueError):
    """A topology that cannot be: a position out of range, a duplicate, mismatched lengths."""


class Index(NamedTuple):
    """The derived lists through which kernels read a pool; see docs/architecture.md for their
    contract.
    """

    row_ptr: Tensor
    row_cols: Tensor
    row_slots: Tensor
    col_ptr: Tensor
    col_rows: Tensor
    col_slots: Tensor


def matrix_size(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight of ``shape`` (output dimension first) as a matrix; ValueError if
    it is none.
    """
    if len(shape) < 2 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(
            f"a weight needs at least two dimensions, all of them at least 1, not {tuple(shape)}"
        )
    return int(shape[0]), math.prod(int(n) for n in shape[1:])


def index_dtype(rows: int, cols: int, capacity: int) -> torch.dtype:
    """int32 while every dimension, slot number and pointer fits, else int64."""
    return torch.int32 if max(rows, cols, capacity) < 2**31 else torch.int64


def empty_index(
    n_rows: int,
    n_cols: int,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Index:
    """Zero-filled lists of the right lengths (the index of a pool without connections)."""
    lengths = (n_rows + 1, capacity, capacity, n_cols + 1, capacity, capacity)
    return Index(*(torch.zeros(length, dtype=dtype, device=device) for length in lengths))


def sample(n_rows: int, n_cols: int, connections: int, seed: int) -> tuple[Tensor, Tensor]:
    """A uniformly random topology with exactly ``connections`` connections, sorted by (row, col);
    int64.

    Without replacement, so the budget is met exactly (DEEP R's authors draw with it and start below
    K). O(K) memory.
    """
    total = n_rows * n_cols
    if not 0 <= connections <= total:
        raise TopologyError(
            f"{connections} connections do not fit a {n_rows} x {n_cols} matrix: choose between 0 "
            f"and {total}"
        )
    keys = random.distinct(connections, total, seed, 0, _INITIAL)
    return keys // max(n_cols, 1), keys % max(n_cols, 1)


#: Stream of the first topology. Methods take streams of their own from `rewire.methods.core.base`.
_INITIAL = 0


# --- building and changing ------------------------------------------------------------------------


def build_index(
    rows: Tensor, cols: Tensor, n_rows: int, n_cols: int, out: Index | None = None
) -> Index:
    """Validate a pool and derive its index, into the tensors of ``out`` if given.

    Raises `TopologyError` on a position out of range, a half-empty slot or a duplicate connection,
    RuntimeError if tensors of ``out`` share memory with each other, rows or cols; ``out`` is then
    unchanged.
    """
    if rows.shape != cols.shape or rows.dim() != 1:
        raise TopologyError(
            f"rows and cols must be 1-D and equally long, not {tuple(rows.shape)} and "
            f"{tuple(cols.shape)}"
        )
    check_integers(rows=rows, cols=cols)
    if out is None:
        out = empty_index(n_rows, n_cols, rows.numel(), rows.dtype, rows.device)
    if _native.available() and rows.device.type == "cpu":
        problem = torch.ops.rewire.build_index_(rows, cols, n_rows, n_cols, *out)
        raise_problem(problem, rows, cols, n_rows, n_cols, rows.numel())
        return out
    _check_apart(out, (rows, cols))
    _check_range(rows, cols, n_rows, n_cols)
    # Sorting by the int64 position orders both lists; the stable second sort keeps rows ascending
    # within a column.
    active = (rows >= 0).nonzero().flatten()
    r, c = rows[active].long(), cols[active].long()
    position, order = torch.sort(r * n_cols + c)
    repeated = (position[1:] == position[:-1]).nonzero().flatten()
    if repeated.numel():
        k = int(position[repeated[0]].item())
        raise TopologyError(_duplicate(k // n_cols, k % n_cols))
    by_row = active[order]
    by_col = by_row[torch.sort(c[order], stable=True).indices]
    for ptr, other, slots, chosen, own, foreign, count in (
        (out.row_ptr, out.row_cols, out.row_slots, by_row, rows, cols, n_rows),
        (out.col_ptr, out.col_rows, out.col_slots, by_col, cols, rows, n_cols),
    ):
        ptr[0] = 0
        ptr[1:] = torch.cumsum(torch.bincount(own[chosen].long(), minlength=count), 0).to(ptr.dtype)
        other.zero_()[: chosen.numel()] = foreign[chosen].to(other.dtype)
        slots.zero_()[: chosen.numel()] = chosen.to(slots.dtype)
    return out


def replace_(
    rows: Tensor,
    cols: Tensor,
    index: Index,
    n_rows: int,
    n_cols: int,
    slots: Tensor,
    new_rows: Tensor,
    new_cols: Tensor,
) -> int:
    """Overwrite ``slots`` (int64) with new positions (-1, -1 empties a slot), in place; return K
    afterwards.

    Everything is validated first: slots in range and distinct, positions in range, no connection
    twice in the result (moving a connection between two changed slots is fine). On an error nothing
    has changed. ``slots``, ``new_rows`` and ``new_cols`` may be views of the other tensors; those
    must not share memory (RuntimeError). Costs one streaming pass over the lists when few slots
    change, a rebuild when many do.
    """
    if not slots.shape == new_rows.shape == new_cols.shape or slots.dim() != 1:
        raise TopologyError(
            "slots, rows and cols must be 1-D and equally long, "
            f"not {tuple(slots.shape)}, {tuple(new_rows.shape)} and {tuple(new_cols.shape)}"
        )
    check_integers(slots=slots, rows=new_rows, cols=new_cols)
    if _native.available() and rows.device.type == "cpu":
        problem = torch.ops.rewire.replace_(
            rows,
            cols,
            *index,
            n_rows,
            n_cols,
            slots,
            new_rows.to(torch.int64),
            new_cols.to(torch.int64),
        )
        raise_problem(problem, new_rows, new_cols, n_rows, n_cols, rows.numel())
    else:
        _check_apart((rows, cols, *index))
        check_slots(slots, rows.numel())
        _check_range(new_rows, new_cols, n_rows, n_cols)
        changed_rows, changed_cols = rows.clone(), cols.clone()
        changed_rows[slots] = new_rows.to(rows.dtype)
        changed_cols[slots] = new_cols.to(cols.dtype)
        build_index(changed_rows, changed_cols, n_rows, n_cols, out=index)
        rows.copy_(changed_rows)
        cols.copy_(changed_cols)
    return int(index.row_ptr[-1].item())


# The native twins return (code, a, b) as a tuple of integers: 0 is success, the others name what is
# wrong, with the offending numbers; wording an error stays here, in one place.
OK, SLOT, RANGE, DUPLICATE = 0, 1, 2, 3


def raise_problem(
    problem: tuple[int, int, int],
    rows: Tensor,
    cols: Tensor,
    n_rows: int,
    n_cols: int,
    capacity: int,
) -> None:
    """Raise `TopologyError` unless a native function's ``problem`` is OK; rows and cols are what it
    was given.
    """
    if problem[0] == OK:
        return
    code, a, b = (int(p) for p in problem)
    if code == SLOT:
        raise TopologyError(_bad_slot(a, capacity))
    if code == RANGE:  # a is the place in rows / cols
        raise TopologyError(_out_of_range(int(rows[a]), int(cols[a]), n_rows, n_cols))
    if code == DUPLICATE:  # a, b are the row and column
        raise TopologyError(_duplicate(a, b))


def _out_of_range(row: int, col: int, n_rows: int, n_cols: int) -> str:
    return (
        f"connection ({row}, {col}) is outside the {n_rows} x {n_cols} matrix: "
        f"rows are 0 to {n_rows - 1}, columns 0 to {n_cols - 1}, and (-1, -1) is an empty slot"
    )


def _duplicate(row: int, col: int) -> str:
    return (
        f"connection ({row}, {col}) occurs more than once: every connection may "
        "occupy one "
        "slot only"
    )


def _bad_slot(slot: int, capacity: int) -> str:
    return (
        f"slot {slot} is out of range or given twice: slots are 0 to {capacity - 1}, "
        "each at "
        "most once"
    )


def check_integers(**tensors: Tensor) -> None:
    """Raise `TopologyError` for a dtype that would have to be rounded, wrapped or read as a
    mask.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TopologyError(f"{name} must be int32 or int64, not {tensor.dtype}")


def _check_apart(written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> None:
    """Raise RuntimeError if a tensor to be written shares memory with another one."""
    spans = [
        (t.data_ptr(), t.data_ptr() + ((t.numel() - 1) * t.stride(0) + 1) * t.element_size())
        for t in (*written, *read)
    ]
    empty = [t.numel() == 0 for t in (*written, *read)]
    for a in range(len(written)):
        for b in range(a + 1, len(spans)):
            if (
                not empty[a]
                and not empty[b]
                and spans[a][0] < spans[b][1]
                and spans[b][0] < spans[a][1]
            ):
                raise RuntimeError("rows, cols and the lists of the index must not share memory")


def _check_range(rows: Tensor, cols: Tensor, n_rows: int, n_cols: int) -> None:
    empty = (rows == -1) & (cols == -1)
    inside = (rows >= 0) & (rows < n_rows) & (cols >= 0) & (cols < n_cols)
    bad = (~(inside | empty)).nonzero().flatten()
    if bad.numel():
        k = int(bad[0].item())
        raise TopologyError(_out_of_range(int(rows[k].item()), int(cols[k].item()), n_rows, n_cols))


def check_slots(slots: Tensor, capacity: int) -> None:
    """Raise `TopologyError` for a slot that is not there or given twice."""
    bad = ((slots < 0) | (slots >= capacity)).nonzero().flatten()
    if bad.numel():
        raise TopologyError(_bad_slot(int(slots[bad[0]].item()), capacity))
    ordered = torch.sort(slots).values
    twice = (ordered[1:] == ordered[:-1]).nonzero().flatten()
    if twice.numel():
        raise TopologyError(_bad_slot(int(ordered[twice[0]].item()), capacity))


# --- sampling dormant connections -----------------------------------------------------------------


def sample_dormant(
    index: Index,
    n_rows: int,
    n_cols: int,
    n: int,
    dropped_rows: Tensor,
    dropped_cols: Tensor,
    seed: int,
    step: int,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """``n`` distinct connections, uniform over those dormant once ``dropped`` are gone; int64 rows
    and cols.

    The index still contains the dropped connections (d of them, active, distinct): they are
    candidates like any other dormant one, so there is always room for as many as were dropped. A
    uniformly random subset of the ranks ``0 ... M - K + d - 1`` is drawn (`rewire.random.distinct`)
    and mapped by `candidates`; exact at every density, no rejection against the topology. Time O(n
    (log rows + log fan-in)), memory O(n) (native).
    """
    free = n_rows * n_cols - int(index.row_ptr[-1].item()) + dropped_rows.numel()
    if not 0 <= n <= free:
        raise TopologyError(
            f"cannot grow {n} connections where {free} are dormant: choose between 0 and {free}"
        )
    if _native.available() and index.row_ptr.device.type == "cpu":
        rows, cols = torch.ops.rewire.sample_dormant(
            index.row_ptr, index.row_cols, n_cols, n, dropped_rows, dropped_cols, seed, step, stream
        )
        return rows, cols
    ranks = random.distinct(n, free, seed, step, stream, device=index.row_ptr.device)
    return candidates(index, n_rows, n_cols, ranks, dropped_rows, dropped_cols)


def candidates(
    index: Index,
    n_rows: int,
    n_cols: int,
    ranks: Tensor,
    dropped_rows: Tensor,
    dropped_cols: Tensor,
) -> tuple[Tensor, Tensor]:
    """Map ranks to candidate connections: rank u < M - K is the u-th dormant position in (row, col)
    order, and rank M - K + i is the i-th dropped connection. int64 in and out.
    """
    if _native.available() and index.row_ptr.device.type == "cpu":
        rows, cols = torch.ops.rewire.candidates(
            index.row_ptr, index.row_cols, n_cols, ranks, dropped_rows, dropped_cols
        )
        return rows, cols
    ptr = index.row_ptr.long()
    dormant_before = torch.arange(n_rows + 1, device=ptr.device) * n_cols - ptr
    dormant = int(dormant_before[-1].item())
    again = ranks >= dormant
    # Full rows repeat a value of dormant_before; the last of them that is <= rank has room.
    row = torch.searchsorted(dormant_before, ranks.clamp(max=dormant - 1), right=True) - 1
    row = row.clamp(min=0)
    col = _nth_dormant_col(index, row, ranks - dormant_before[row])
    taken = (ranks - dormant).clamp(min=0)[again]
    row[again], col[again] = dropped_rows.long()[taken], dropped_cols.long()[taken]
    return row, col


def _nth_dormant_col(index: Index, row: Tensor, nth: Tensor) -> Tensor:
    """Column of the ``nth`` dormant position of each ``row``.

    With the row's active columns c_0 < c_1 < ..., the nth dormant column is nth + j, where j counts
    the i with c_i - i <= nth; c_i - i never decreases, so a binary search finds j.
    """
    begin, end = index.row_ptr[row].long(), index.row_ptr[row + 1].long()
    low, high = torch.zeros_like(begin), end - begin
    longest = int(high.max().item()) if high.numel() else 0
    for _ in range(longest.bit_length()):
        middle = (low + high) // 2
        open_ = low < high
        at = (begin + middle).clamp(max=max(index.row_cols.numel() - 1, 0))
        before = open_ & (index.row_cols[at].long() - middle <= nth)
        low = torch.where(before, middle + 1, low)
        high = torch.where(open_ & ~before, middle, high)
    return nth + low


def sample_dormant_in_rows(
    index: Index,
    n_rows: int,
    n_cols: int,
    dropped_rows: Tensor,
    dropped_cols: Tensor,
    seed: int,
    step: int,
    stream: int,
) -> Tensor:
    """For every dropped connection a new column in its own row, so that every fan-in is kept;
    int64.

    ``dropped_rows`` (int64) is sorted ascending. Within row r with d_r dropped connections the new
    columns are a uniformly random subset (`rewire.random.distinct` with ``offset = r << 32``) of
    the ``cols - fan_in + d_r`` candidates: the dormant columns in ascending order, then the dropped
    ones in the order given.
    """
    if _native.available() and index.row_ptr.device.type == "cpu":
        drawn: Tensor = torch.ops.rewire.sample_dormant_in_rows(
            index.row_ptr, index.row_cols, n_cols, dropped_rows, dropped_cols, seed, step, stream
        )
        return drawn
    if not dropped_rows.numel():
        return dropped_cols.long().clone()
    unique, first, count = _runs(dropped_rows)
    fan_in = (index.row_ptr[1:] - index.row_ptr[:-1]).long()[unique]
    dormant = n_cols - fan_in
    rank = torch.empty_like(dropped_rows)
    alone = count == 1
    rank[first[alone]] = random.below(
        seed, step, stream, unique[alone] << 32, (dormant + count)[alone]
    )
    for u, f, c, free in zip(
        *(t[~alone].tolist() for t in (unique, first, count, dormant + count)), strict=True
    ):
        rank[f : f + c] = random.distinct(
            c, free, seed, step, stream, offset=u << 32, device=rank.device
        )
    # A row of which the only candidate is drawn: distinct() then draws nothing, but below(..., 1)
    # is 0 as well.
    run = torch.repeat_interleave(torch.arange(unique.numel(), device=rank.device), count)
    again = rank >= dormant[run]
    col = _nth_dormant_col(index, dropped_rows, rank.clamp(min=0))
    origin = (first[run] + rank - dormant[run])[again]
    col[again] = dropped_cols.long()[origin]
    return col


def sample_in_rows(
    rows: Tensor,
    cols: Tensor,
    n_rows: int,
    n_cols: int,
    need: Tensor,
    seed: int,
    step: int,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """``need[r]`` uniformly random columns in every row r, distinct and not among those that
    ``rows, cols`` take.

    need: int64, (n_rows,), at least 0. rows, cols: int64, (n,), in any order. The result has
        sum(need) of both, int64,
    its rows ascending. Raises `TopologyError` where a row has not as many columns left. O(n +
    sum(need) + n_rows + n_cols); on other devices than the CPU with a loop over the rows that draw
    several.
    """
    if need.shape != (n_rows,) or bool((need < 0).any()):
        raise TopologyError(
            f"need must have a number of at least 0 for each of the {n_rows} "
            f"rows, not {need.tolist()}"
        )
    index = build_index(rows, cols, n_rows, n_cols)
    free = n_cols - (index.row_ptr[1:] - index.row_ptr[:-1]).long()
    if bool((need > free).any()):
        row = int((need > free).nonzero()[0].item())
        raise TopologyError(
            f"row {row} has {int(free[row])} columns left, not {int(need[row])}: ask for fewer"
        )
    new = torch.repeat_interleave(torch.arange(n_rows, device=need.device), need)
    first = torch.cumsum(need, 0) - need
    # Draws are made for connections that leave: let the first free columns be taken and leave
    # again, so that the draw is among all columns that were free, and no others.
    nth = torch.arange(new.numel(), device=need.device) - first[new]
    ahead = _nth_dormant_col(index, new, nth)
    filled = build_index(torch.cat([rows, new]), torch.cat([cols, ahead]), n_rows, n_cols)
    return new, sample_dormant_in_rows(filled, n_rows, n_cols, new, ahead, seed, step, stream)


def _runs(sorted_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct values of a sorted tensor, where each begins, and how often it occurs."""
    value, count = torch.unique_consecutive(sorted_values, return_counts=True)
    return value, torch.cumsum(count, 0) - count, count


# --- signs and fingerprints -----------------------------------------------------------------------


def position_signs(rows: Tensor, cols: Tensor, seed: int, stream: int) -> Tensor:
    """The sign (+1 or -1, int8) that belongs to each position for good: a hash of (seed, stream,
    row, col).

    This gives every one of the M positions its fixed sign without storing M of them. Philox
    counter: ``(row low, col low, row high, 2**31 | (stream & 0x7fff) << 16 | (col high &
    0xffff))``; the top bit keeps it apart from every other stream.
    """
    if _native.available() and rows.device.type == "cpu":
        signs: Tensor = torch.ops.rewire.position_signs(rows.long(), cols.long(), seed, stream)
        return signs
    r, c = rows.long(), cols.long()
    tag = 2**31 | (stream & 0x7FFF) << 16 | ((c >> 32) & 0xFFFF)
    w0, _, _, _ = random.words(seed, r & 0xFFFFFFFF, c & 0xFFFFFFFF, (r >> 32) & 0xFFFFFFFF, tag)
    return (1 - 2 * (w0 & 1)).to(torch.int8)


def fingerprint(rows: Tensor, cols: Tensor) -> int:
    """A 63-bit hash of the set of connections, whatever slots they occupy; equal sets give equal
    hashes.
    """
    active = rows >= 0
    r, c = rows[active].long(), cols[active].long()
    if not r.numel():
        return 0
    w0, w1, _, _ = random.words(0, r & 0xFFFFFFFF, c & 0xFFFFFFFF, r >> 32, c >> 32)
    return int(((w1 << 32) ^ w0).sum().item()) & (random.SEED_BOUND - 1)

"""Which connections exist: positions in slots, and the lists derived from them.

A pool describes a rows x cols matrix by two integer tensors of length C: slot k holds the
connection ``(rows[k], cols[k])`` or is empty (both -1). All functions take O(K + rows + cols)
memory at most; no function allocates rows x cols. The plain PyTorch code here is the definition and
runs on any device. On the CPU it calls native functions (``torch.ops.rewire.build_index_``,
``replace_`` and ``position_signs``) with bit-identical results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rewire import _native, random


class TopologyError(ValueError):
    """An invalid topology: a position out of range, a duplicate, mismatched lengths."""


class Lists(NamedTuple):
    """The connections of a pool in one order: those of row (or column) r are at
    ``ptr[r] : ptr[r + 1]``, in column (or row) ``idx[i]`` and slot ``slots[i]``.
    """

    ptr: Tensor
    idx: Tensor
    slots: Tensor


class Index(NamedTuple):
    """The lists by row and by column through which kernels read a pool; see
    docs/architecture.md.
    """

    row_ptr: Tensor
    row_cols: Tensor
    row_slots: Tensor
    col_ptr: Tensor
    col_rows: Tensor
    col_slots: Tensor

    @property
    def by_row(self) -> Lists:
        """The lists in (row, col) order."""
        return Lists(self.row_ptr, self.row_cols, self.row_slots)

    @property
    def by_col(self) -> Lists:
        """The lists in (col, row) order."""
        return Lists(self.col_ptr, self.col_rows, self.col_slots)


def matrix_size(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight of ``shape`` (output dimension first) as a matrix.

    Raises ValueError for fewer than two dimensions, or a dimension below 1.
    """
    if len(shape) < 2 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(
            f"a weight needs at least two dimensions, all of them at least 1, not {tuple(shape)}"
        )
    return int(shape[0]), math.prod(int(n) for n in shape[1:])


def index_dtype(rows: int, cols: int, capacity: int) -> torch.dtype:
    """int32 if all dimensions, slot numbers and pointers fit, else int64."""
    return torch.int32 if max(rows, cols, capacity) < 2**31 else torch.int64


def empty_index(
    n_rows: int,
    n_cols: int,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Index:
    """The index of a pool without connections: zeros of the right lengths."""
    lengths = (n_rows + 1, capacity, capacity, n_cols + 1, capacity, capacity)
    return Index(*(torch.zeros(length, dtype=dtype, device=device) for length in lengths))


# --- building and changing ------------------------------------------------------------------------


def build_index(
    rows: Tensor, cols: Tensor, n_rows: int, n_cols: int, out: Index | None = None
) -> Index:
    """Check a pool and build its index, in the tensors of ``out`` if given.

    Raises `TopologyError` on a position out of range, a half-empty slot or a duplicate connection,
    and RuntimeError if tensors of ``out`` share memory with each other, rows or cols; ``out`` is
    then unchanged.
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
    """Overwrite ``slots`` (int64) with new positions (-1, -1 empties a slot), in place; return the
    new K.

    Slots must be in range and distinct, positions in range, and no connection may occur twice in
    the result (a connection may move between two changed slots); else this raises `TopologyError`,
    with nothing changed. ``slots``, ``new_rows`` and ``new_cols`` may be views of the other
    tensors, which must not share memory with each other (RuntimeError). Costs one streaming pass
    over the lists if few slots change, a rebuild if many do.
    """
    if not slots.shape == new_rows.shape == new_cols.shape or slots.dim() != 1:
        raise TopologyError(
            f"slots, rows and cols must be 1-D and equally long, not {tuple(slots.shape)}, "
            f"{tuple(new_rows.shape)} and {tuple(new_cols.shape)}"
        )
    check_integers(slots=slots, rows=new_rows, cols=new_cols)
    if _native.available() and rows.device.type == "cpu":
        new = new_rows.to(torch.int64), new_cols.to(torch.int64)
        problem = torch.ops.rewire.replace_(rows, cols, *index, n_rows, n_cols, slots, *new)
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


#: Native functions return (code, a, b): one of these codes, and the numbers that are wrong.
#: `raise_problem` puts the error into words.
OK, SLOT, RANGE, DUPLICATE = 0, 1, 2, 3


def raise_problem(
    problem: tuple[int, int, int],
    rows: Tensor,
    cols: Tensor,
    n_rows: int,
    n_cols: int,
    capacity: int,
) -> None:
    """Raise `TopologyError` unless a native function's ``problem`` is `OK`; rows and cols are its
    arguments.
    """
    if problem[0] == OK:
        return
    code, a, b = (int(p) for p in problem)
    if code == SLOT:
        raise TopologyError(_bad_slot(a, capacity))
    if code == RANGE:  # a is the place in rows and cols
        raise TopologyError(_out_of_range(int(rows[a]), int(cols[a]), n_rows, n_cols))
    if code == DUPLICATE:  # a, b are the row and column
        raise TopologyError(_duplicate(a, b))


def _out_of_range(row: int, col: int, n_rows: int, n_cols: int) -> str:
    return (
        f"connection ({row}, {col}) is outside the {n_rows} x {n_cols} matrix: rows are 0 to "
        f"{n_rows - 1}, columns 0 to {n_cols - 1}, and (-1, -1) is an empty slot"
    )


def _duplicate(row: int, col: int) -> str:
    return (
        f"connection ({row}, {col}) occurs more than once: every connection may occupy one slot "
        "only"
    )


def _bad_slot(slot: int, capacity: int) -> str:
    return (
        f"slot {slot} is out of range or given twice: slots are 0 to {capacity - 1}, each at most "
        "once"
    )


def check_integers(**tensors: Tensor) -> None:
    """Raise `TopologyError` unless the tensors are int32 or int64, which need no rounding."""
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
            overlap = spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1]
            if overlap and not empty[a] and not empty[b]:
                raise RuntimeError("rows, cols and the lists of the index must not share memory")


def _check_range(rows: Tensor, cols: Tensor, n_rows: int, n_cols: int) -> None:
    empty = (rows == -1) & (cols == -1)
    inside = (rows >= 0) & (rows < n_rows) & (cols >= 0) & (cols < n_cols)
    bad = (~(inside | empty)).nonzero().flatten()
    if bad.numel():
        k = int(bad[0].item())
        raise TopologyError(_out_of_range(int(rows[k].item()), int(cols[k].item()), n_rows, n_cols))


def check_slots(slots: Tensor, capacity: int) -> None:
    """Raise `TopologyError` for a slot that does not exist or is given twice."""
    bad = ((slots < 0) | (slots >= capacity)).nonzero().flatten()
    if bad.numel():
        raise TopologyError(_bad_slot(int(slots[bad[0]].item()), capacity))
    ordered = torch.sort(slots).values
    twice = (ordered[1:] == ordered[:-1]).nonzero().flatten()
    if twice.numel():
        raise TopologyError(_bad_slot(int(ordered[twice[0]].item()), capacity))


# --- signs and fingerprints -----------------------------------------------------------------------


def position_signs(rows: Tensor, cols: Tensor, seed: int, stream: int) -> Tensor:
    """The fixed sign (+1 or -1, int8) of each position: a hash of (seed, stream, row, col).

    So each of the M positions has a sign, and none is stored. The Philox counter is ``(row low, col
    low, row high, 2**31 | (stream & 0x7fff) << 16 | (col high & 0xffff))``; no stream has its top
    bit.
    """
    if _native.available() and rows.device.type == "cpu":
        signs: Tensor = torch.ops.rewire.position_signs(rows.long(), cols.long(), seed, stream)
        return signs
    r, c = rows.long(), cols.long()
    tag = 2**31 | (stream & 0x7FFF) << 16 | ((c >> 32) & 0xFFFF)
    w0, _, _, _ = random.words(seed, r & 0xFFFFFFFF, c & 0xFFFFFFFF, (r >> 32) & 0xFFFFFFFF, tag)
    return (1 - 2 * (w0 & 1)).to(torch.int8)


def fingerprint(rows: Tensor, cols: Tensor) -> int:
    """A 63-bit hash of the set of connections, in whatever slots they are."""
    active = rows >= 0
    r, c = rows[active].long(), cols[active].long()
    if not r.numel():
        return 0
    w0, w1, _, _ = random.words(0, r & 0xFFFFFFFF, c & 0xFFFFFFFF, r >> 32, c >> 32)
    return int(((w1 << 32) ^ w0).sum().item()) & (random.SEED_BOUND - 1)

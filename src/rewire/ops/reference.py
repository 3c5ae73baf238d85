"""The products in plain PyTorch, for any device and dtype; tests compare the kernels with them.

Connections are processed in blocks, so that no (connections, batch) array of the whole list is ever
allocated. Everything here traces under `torch.compile`: Python reads no tensor, and list entries
from ``ptr[-1]`` on are masked out, not cut off.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "batch_major",
    "blocks",
    "check_lists",
    "feature_major",
    "rows_of",
    "sddmm",
    "spmm",
    "spmm_sddmm",
    "sum_dtype",
]

#: Elements of the largest temporary: connections in a block times the batch size.
_BLOCK_ELEMENTS = 1 << 22
#: A compiled graph contains every block, so there are few.
_MAX_BLOCKS = 256


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of products of ``dtype``: float32 for 16 bits, else ``dtype`` itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def feature_major(x: Tensor) -> Tensor:
    """A copy of ``x`` (batch, features) with strides (1, batch)."""
    out = torch.empty_strided(x.shape, (1, x.shape[0]), dtype=x.dtype, device=x.device)
    return out.copy_(x)


def batch_major(x: Tensor) -> Tensor:
    """A row-major contiguous copy of ``x`` (batch, features)."""
    return x.clone(memory_format=torch.contiguous_format)


def rows_of(ptr: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Row of each list entry from ``start`` to ``stop``, and whether it is a connection."""
    place = torch.arange(start, stop, device=ptr.device, dtype=ptr.dtype)
    row = torch.searchsorted(ptr, place, right=True) - 1
    active = place < ptr[-1]
    return row.clamp(0, max(ptr.shape[0] - 2, 0)), active


def blocks(
    length: int, batch: int, positions: int = 1, *, few: bool = True
) -> Iterator[tuple[int, int]]:
    """Ranges of list entries; temporaries of ``batch * positions`` numbers for each entry stay
    small.

    ``few``: rather larger temporaries than many ranges; always so while a compiler traces.
    """
    compiling = torch.compiler.is_compiling()
    if compiling:
        batch = 1  # the number of blocks must not depend on a batch size that may be symbolic
    size = max(1, _BLOCK_ELEMENTS // max(batch * positions, 1))
    if few or compiling:
        size = max(size, -(-length // _MAX_BLOCKS))
    for first in range(0, length, size):
        yield first, min(first + size, length)


def spmm(
    ptr: Tensor, idx: Tensor, slots: Tensor, values: Tensor, x: Tensor, bias: Tensor | None
) -> Tensor:
    """``y[b, r] = bias[r] + sum of values[slots[i]] * x[b, idx[i]]`` over the connections i of row
    r.
    """
    check_lists(ptr, idx, slots)
    if x.dim() != 2 or values.dim() != 1:
        raise RuntimeError("spmm: x must have two dimensions and values one")
    sums = sum_dtype(x.dtype)
    if any(t is not None and t.dtype not in (x.dtype, sums) for t in (values, bias)):
        raise RuntimeError(
            "spmm: values, bias and x must have one dtype, or float32 and one of 16 bits"
        )
    if sums != x.dtype:
        wide = spmm(
            ptr, idx, slots, values.to(sums), x.to(sums), None if bias is None else bias.to(sums)
        )
        return wide.to(x.dtype)
    rows = ptr.shape[0] - 1
    if bias is not None and bias.shape != (rows,):
        raise RuntimeError("spmm: bias must have one entry per row")
    start = x.new_zeros(rows) if bias is None else bias
    # The result is not a view, so that activations may work on it in place; `y` is a view of it in
    # the kernels' orientation.
    out = torch.empty_strided((x.shape[0], rows), (1, x.shape[0]), dtype=x.dtype, device=x.device)
    y = out.copy_(start.expand(x.shape[0], rows)).t()
    length = idx.shape[0]
    if rows and length and x.shape[1]:
        features = x.t()
        for first, stop in blocks(length, x.shape[0]):
            row, active = rows_of(ptr, first, stop)
            value = torch.where(active, values[slots[first:stop]], 0)
            y.index_add_(0, row, value.unsqueeze(1) * features[idx[first:stop]])
    return out


def sddmm(ptr: Tensor, idx: Tensor, slots: Tensor, capacity: int, g: Tensor, x: Tensor) -> Tensor:
    """``out[slots[i]] = sum over b of g[b, r] * x[b, idx[i]]`` over the connections i of row r;
    else zero.
    """
    check_lists(ptr, idx, slots)
    if g.dim() != 2 or x.dim() != 2 or g.shape[0] != x.shape[0] or g.shape[1] != ptr.shape[0] - 1:
        raise RuntimeError("sddmm: g must be (batch, rows) and x (batch, features)")
    if g.dtype != x.dtype:
        raise RuntimeError("sddmm: g and x must have one dtype")
    sums = sum_dtype(x.dtype)
    g, x = g.to(sums), x.to(sums)
    out = x.new_zeros(capacity)
    length = idx.shape[0]
    if g.shape[1] and length and x.shape[1]:
        gradients, features = g.t(), x.t()
        for first, stop in blocks(length, x.shape[0]):
            row, active = rows_of(ptr, first, stop)
            dots = (gradients[row] * features[idx[first:stop]]).sum(1)
            # An entry behind the last connection names slot 0, and adds 0 to it.
            out = out.index_add(0, slots[first:stop], torch.where(active, dots, 0))
    return out


def spmm_sddmm(
    ptr: Tensor, idx: Tensor, slots: Tensor, values: Tensor, g: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """`spmm` of ``values`` and x, and `sddmm` of g and x, over one list."""
    return spmm(ptr, idx, slots, values, x, None), sddmm(ptr, idx, slots, values.shape[0], g, x)


def check_lists(ptr: Tensor, idx: Tensor, slots: Tensor) -> None:
    """Raise RuntimeError unless the three can be an index list."""
    if ptr.dim() != 1 or idx.dim() != 1 or idx.shape != slots.shape or not ptr.shape[0]:
        raise RuntimeError(
            "ptr, idx and slots must have one dimension, idx and slots the same length"
        )
    integers = ptr.dtype in (torch.int32, torch.int64)
    if not integers or idx.dtype != ptr.dtype or slots.dtype != ptr.dtype:
        raise RuntimeError("ptr, idx and slots must have one dtype, int32 or int64")

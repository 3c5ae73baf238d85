"""Sparse convolutions in plain PyTorch, for any device, dtype and rank; tests compare the kernels
with them.

A connection is one multiply-add of a shifted plane of the source. The planes are views of the
padded source (nothing like im2col is stored), and connections are processed in blocks, so that
temporaries stay small. Everything here traces under `torch.compile`, as `rewire.ops.reference`
does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rewire.ops.geometry import Geometry, planes
from rewire.ops.reference import blocks, check_lists, rows_of
from rewire.topology import Lists

__all__ = ["conv", "conv_input_gradient", "conv_value_gradient"]


def _at(position: Tensor, kernel: Sequence[int]) -> tuple[Tensor, ...]:
    """Kernel positions, counted row-major, as one index per dimension."""
    found = []
    for size in reversed(kernel):
        found.append(position % size)
        position = position // size
    return tuple(reversed(found))


def _entries(
    ptr: Tensor, idx: Tensor, x: Tensor, geometry: Geometry, sizes: Sequence[int]
) -> Iterator[tuple[slice, Tensor, tuple[Tensor, ...], Tensor]]:
    """The list by row in blocks: which entries, their rows, the index of each one's plane, and
    whether it is a connection.
    """
    rows, kk = ptr.shape[0] - 1, math.prod(geometry.kernel)
    per_group = x.shape[1] // geometry.groups
    for first, stop in blocks(idx.shape[0], x.shape[0], math.prod(sizes), few=False):
        row, active = rows_of(ptr, first, stop)
        col = idx[first:stop].long()
        channel = row.long() // (rows // geometry.groups) * per_group + col // kk
        yield slice(first, stop), row, (channel, *_at(col % kk, geometry.kernel)), active


def _add(y: Tensor, rows: Tensor, value: Tensor, plane: Tensor) -> Tensor:
    """Add ``value[i]`` times ``plane[i]`` to row ``rows[i]`` of y."""
    weight = value.reshape(-1, *(1,) * (y.dim() - 1))
    return y.index_add(0, rows.clamp(0, y.shape[0] - 1), weight * plane)


def conv(
    lists: Lists, values: Tensor, x: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """See `rewire.ops.conv_kernels.conv`; in any strides."""
    check_lists(*lists)
    ptr, idx, slots = lists
    rows, sizes = ptr.shape[0] - 1, geometry.output(x.shape[2:])
    start = x.new_zeros(rows) if bias is None else bias
    y = start.reshape(rows, *(1,) * (len(sizes) + 1)).expand(rows, *sizes, x.shape[0]).contiguous()
    if math.prod(sizes):
        source = planes(x, geometry)
        for entries, row, at, active in _entries(ptr, idx, x, geometry, sizes):
            value = torch.where(active, values[slots[entries]], 0)
            y = _add(y, row, value, source[at])
    return y.movedim(-1, 0)


def conv_input_gradient(
    lists: Lists, values: Tensor, g: Tensor, sizes: Sequence[int], inputs: int, geometry: Geometry
) -> Tensor:
    """See `rewire.ops.conv_kernels.conv_input_gradient`.

    It is a convolution of stride 1 of the gradient, spread out by the stride, with the kernel
    reversed. The result is in any strides.
    """
    check_lists(*lists)
    ptr, idx, slots = lists
    rank, kk = len(sizes), math.prod(geometry.kernel)
    per_group, outputs = inputs // geometry.groups, g.shape[1] // geometry.groups
    y = g.new_zeros(inputs, *sizes, g.shape[0])
    if math.prod(sizes) and math.prod(g.shape[2:]):
        spread = [(n - 1) * s + 1 for n, s in zip(g.shape[2:], geometry.stride, strict=True)]
        if any(s > 1 for s in geometry.stride):
            wide = g.new_zeros(*g.shape[:2], *spread)
            every = [slice(None), slice(None), *(slice(None, None, s) for s in geometry.stride)]
            wide[tuple(every)] = g
            g = wide
        reach = [d * (k - 1) for k, d in zip(geometry.kernel, geometry.dilation, strict=True)]
        low = [reach[a] - geometry.padding[2 * a] for a in range(rank)]
        high = [sizes[a] + reach[a] - low[a] - spread[a] for a in range(rank)]
        padding = tuple(p for pair in zip(low, high, strict=True) for p in pair)
        source = planes(g, geometry._replace(stride=(1,) * rank, padding=padding))
        for first, stop in blocks(idx.shape[0], g.shape[0], math.prod(sizes), few=False):
            col, active = rows_of(ptr, first, stop)
            col, row = col.long(), idx[first:stop].long()
            target = row // outputs * per_group + col // kk
            value = torch.where(active, values[slots[first:stop]], 0)
            at = (row, *_at(kk - 1 - col % kk, geometry.kernel))
            y = _add(y, target, value, source[at])
    return y.movedim(-1, 0)


def conv_value_gradient(
    lists: Lists, capacity: int, g: Tensor, x: Tensor, geometry: Geometry
) -> Tensor:
    """See `rewire.ops.conv_kernels.conv_value_gradient`."""
    check_lists(*lists)
    ptr, idx, slots = lists
    sizes = g.shape[2:]
    out = x.new_zeros(capacity)
    if math.prod(sizes) and x.shape[2:].numel():
        source, gradients = planes(x, geometry), g.movedim(0, -1)
        for entries, row, at, active in _entries(ptr, idx, x, geometry, sizes):
            dots = (gradients[row] * source[at]).flatten(1).sum(1)
            out = out.index_add(0, slots[entries], torch.where(active, dots, 0))
    return out

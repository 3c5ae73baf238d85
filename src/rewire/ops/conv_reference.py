"""Sparse convolutions in plain PyTorch, for any device, dtype and rank: the truth that the kernels
are tested against.

A connection is one multiply-add of a shifted plane of the source. The planes are views of the
padded source (nothing like im2col is stored), and connections go in blocks, so that temporaries
stay small. All of it traces under `torch.compile`, like `rewire.ops.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rewire.ops.geometry import Geometry, memory_format
from rewire.ops.reference import _BLOCK_ELEMENTS, _MAX_BLOCKS, _check_lists, _rows_of

__all__ = ["conv", "conv_input_gradient", "conv_value_gradient"]


def _blocks(length: int, positions: Sequence[int], batch: int) -> Iterator[tuple[int, int]]:
    """Ranges of connections whose shifted planes together are a temporary of bounded size."""
    compiling = torch.compiler.is_compiling()
    # Blocks are part of a compiled graph, so they are few there and do not depend on a batch size
    # that may be symbolic.
    least = -(-length // _MAX_BLOCKS) if compiling else 1
    block = max(
        least, _BLOCK_ELEMENTS // max(math.prod(positions) * (1 if compiling else batch), 1)
    )
    for first in range(0, length, block):
        yield first, min(first + block, length)


def _pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Pad (or, where negative, crop) all but the first two dimensions; ``padding`` is (low, high)
    for each in order.
    """
    backwards = [
        p for axis in range(len(padding) // 2 - 1, -1, -1) for p in padding[2 * axis : 2 * axis + 2]
    ]
    return F.pad(x, backwards)


def _planes(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The view [channel, *kernel position, *output position, batch] of ``x`` (batch, channels,
    ...).
    """
    rank = len(kernel)
    for axis in range(rank):
        x = x.unfold(2 + axis, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])
        x = x[..., :: dilation[axis]]
    return x.permute(1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank), 0)


def _at(position: Tensor, kernel: Sequence[int]) -> tuple[Tensor, ...]:
    """Kernel positions, counted row-major, as one index per dimension."""
    found = []
    for size in reversed(kernel):
        found.append(position % size)
        position = position // size
    return tuple(reversed(found))


def _plane(planes: Tensor, channel: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    """Plane ``[channel[i], *at[i]]`` for every i."""
    place = (channel, *at)
    return planes[place]


def _weighted_sum(
    rows: int,
    target: Tensor,
    source: Tensor,
    at: tuple[Tensor, ...],
    value: Tensor,
    planes: Tensor,
    y: Tensor,
) -> Tensor:
    """Add ``value[i]`` times plane ``[source[i], *at[i]]`` to row ``target[i]`` of y."""
    weight = value.reshape(-1, *(1,) * (y.dim() - 1))
    return y.index_add(0, target.clamp(0, rows - 1), weight * _plane(planes, source, at))


def conv(
    ptr: Tensor,
    idx: Tensor,
    slots: Tensor,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    channels_last: bool,
) -> Tensor:
    """See `rewire.ops.conv_kernels.conv`."""
    _check_lists(ptr, idx, slots)
    rows, per_group, kk = (
        ptr.shape[0] - 1,
        x.shape[1] // geometry.groups,
        math.prod(geometry.kernel),
    )
    sizes = geometry.output(x.shape[2:])
    start = x.new_zeros(rows) if bias is None else bias
    y = start.reshape(rows, *(1,) * (len(sizes) + 1)).expand(rows, *sizes, x.shape[0]).contiguous()
    if math.prod(sizes):
        planes = _planes(
            _pad(x, geometry.padding), geometry.kernel, geometry.stride, geometry.dilation
        )
        for first, stop in _blocks(idx.shape[0], sizes, x.shape[0]):
            row, active = _rows_of(ptr, first, stop)
            col = idx[first:stop].long()
            source = row.long() // (rows // geometry.groups) * per_group + col // kk
            value = torch.where(active, values[slots[first:stop]], 0)
            y = _weighted_sum(rows, row, source, _at(col % kk, geometry.kernel), value, planes, y)
    return y.movedim(-1, 0).contiguous(memory_format=memory_format(len(sizes), channels_last))


def conv_input_gradient(
    ptr: Tensor,
    idx: Tensor,
    slots: Tensor,
    values: Tensor,
    g: Tensor,
    sizes: Sequence[int],
    inputs: int,
    geometry: Geometry,
    channels_last: bool,
) -> Tensor:
    """See `rewire.ops.conv_kernels.conv_input_gradient`.

    It is a convolution of stride 1 of the gradient, spread out by the stride, with the kernel
    reversed.
    """
    _check_lists(ptr, idx, slots)
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
        g = _pad(g, [p for pair in zip(low, high, strict=True) for p in pair])
        planes = _planes(g, geometry.kernel, (1,) * rank, geometry.dilation)
        for first, stop in _blocks(idx.shape[0], sizes, g.shape[0]):
            col, active = _rows_of(ptr, first, stop)
            col, source = col.long(), idx[first:stop].long()
            target = source // outputs * per_group + col // kk
            value = torch.where(active, values[slots[first:stop]], 0)
            y = _weighted_sum(
                inputs, target, source, _at(kk - 1 - col % kk, geometry.kernel), value, planes, y
            )
    return y.movedim(-1, 0).contiguous(memory_format=memory_format(rank, channels_last))


def conv_value_gradient(
    ptr: Tensor, idx: Tensor, slots: Tensor, capacity: int, g: Tensor, x: Tensor, geometry: Geometry
) -> Tensor:
    """See `rewire.ops.conv_kernels.conv_value_gradient`."""
    _check_lists(ptr, idx, slots)
    rows, per_group, kk = (
        ptr.shape[0] - 1,
        x.shape[1] // geometry.groups,
        math.prod(geometry.kernel),
    )
    sizes = g.shape[2:]
    out = x.new_zeros(capacity)
    if math.prod(sizes) and x.shape[2:].numel():
        planes = _planes(
            _pad(x, geometry.padding), geometry.kernel, geometry.stride, geometry.dilation
        )
        gradients = g.movedim(0, -1)
        for first, stop in _blocks(idx.shape[0], sizes, x.shape[0]):
            row, active = _rows_of(ptr, first, stop)
            col = idx[first:stop].long()
            source = row.long() // (rows // geometry.groups) * per_group + col // kk
            plane = _plane(planes, source, _at(col % kk, geometry.kernel))
            dots = (gradients[row] * plane).flatten(1).sum(1)
            out = out.index_add(0, slots[first:stop], torch.where(active, dots, 0))
    return out

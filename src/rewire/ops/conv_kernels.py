"""Convolutions: native kernels where they can run, else plain PyTorch.

``lists`` are those of the weight as a matrix, (output channels) by (input channels of a group x
kernel positions); ``x`` and ``g`` are (batch,
channels, ...) with any strides. A native operation allocates its result, O(K) and a few MiB of
scratch per thread; and a copy of a source of which neither the channels nor the last dimension are
contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewire import _native
from rewire.ops import conv_reference, flops
from rewire.ops.geometry import Geometry, memory_format
from rewire.ops.kernels import fake
from rewire.topology import Lists

__all__ = ["conv", "conv_input_gradient", "conv_value_gradient"]

_NATIVE = _native.available("conv")
_DTYPES = (torch.float32, torch.float64)


def conv(
    lists: Lists,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    channels_last: bool,
) -> Tensor:
    """``y[b, o, p] = bias[o] + sum of values[slots[i]] * x[b, c, p * stride + k * dilation -
    padding]``.

    The sum is over the connections i of row o, ``idx[i] = (c within the group, k)``; by-row list.
    The result is contiguous or channels-last. Raises RuntimeError on a bad index. O(K * output
    positions * batch) time.
    """
    if _NATIVE and x.is_cpu and x.dtype in _DTYPES:
        columns = x.shape[1] // geometry.groups * math.prod(geometry.kernel)
        y: Tensor = torch.ops.rewire.conv(
            *lists, values, x, bias, columns, *geometry, channels_last
        )
        return y
    out = conv_reference.conv(lists, values, x, bias, geometry)
    flops.note("conv", *lists, out=out)
    return out.contiguous(memory_format=memory_format(x.dim() - 2, channels_last))


def conv_input_gradient(
    lists: Lists,
    values: Tensor,
    g: Tensor,
    sizes: Sequence[int],
    inputs: int,
    geometry: Geometry,
    channels_last: bool,
) -> Tensor:
    """The gradient of the input (batch, inputs, *sizes) from that of the output; by-column list.
    Cost as `conv`.
    """
    if _NATIVE and g.is_cpu and g.dtype in _DTYPES:
        out: Tensor = torch.ops.rewire.conv_input_gradient(
            *lists, values, g, sizes, inputs, *geometry, channels_last
        )
        return out
    flops.note("conv_input_gradient", *lists, values, g)
    found = conv_reference.conv_input_gradient(lists, values, g, sizes, inputs, geometry)
    return found.contiguous(memory_format=memory_format(len(sizes), channels_last))


def conv_value_gradient(
    lists: Lists, capacity: int, g: Tensor, x: Tensor, geometry: Geometry
) -> Tensor:
    """The gradient of the values (capacity,), 0 in empty slots; by-row list. Cost as `conv`."""
    if _NATIVE and x.is_cpu and x.dtype in _DTYPES:
        columns = x.shape[1] // geometry.groups * math.prod(geometry.kernel)
        out: Tensor = torch.ops.rewire.conv_value_gradient(
            *lists, capacity, g, x, columns, *geometry
        )
        return out
    flops.note("conv_value_gradient", *lists, capacity, g)
    return conv_reference.conv_value_gradient(lists, capacity, g, x, geometry)


def _like(x: Tensor, channels: int, sizes: Sequence[int], channels_last: bool) -> Tensor:
    """An empty tensor for as many samples as x, of its dtype and device."""
    shape = [x.shape[0], channels, *sizes]
    axes = range(len(shape) - 1, -1, -1)  # from the fastest to the slowest
    strides, step = [0] * len(shape), 1
    for axis in (1, *axes[:-2], 0) if channels_last else axes:
        strides[axis] = step
        step = step * shape[axis]
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)


if _NATIVE:
    flops.announce(["conv", "conv_input_gradient", "conv_value_gradient"])

    @fake("conv")
    def _(ptr: Tensor, idx: Any, slots: Any, values: Any, x: Tensor, *rest: Any) -> Tensor:
        # rest: bias, columns, the five entries of a geometry, channels_last
        kernel, stride, padding, dilation = (tuple(part) for part in rest[2:6])
        geometry = Geometry(kernel, stride, padding, dilation, rest[6])
        return _like(x, ptr.shape[0] - 1, geometry.output(x.shape[2:]), rest[7])

    @fake("conv_input_gradient")
    def _(
        ptr: Any, idx: Any, slots: Any, values: Any, g: Tensor, sizes: Any, inputs: int, *rest: Any
    ) -> Tensor:
        return _like(g, inputs, sizes, rest[-1])

    @fake("conv_value_gradient")
    def _(ptr: Any, idx: Any, slots: Any, capacity: int, g: Any, x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((capacity,))

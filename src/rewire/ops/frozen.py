"""Products with frozen weights: the values in order, without slots and without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewire import _native
from rewire.ops import conv_kernels, flops, kernels
from rewire.ops.geometry import Geometry, gathered, is_channels_last
from rewire.topology import Lists

__all__ = ["NATIVE_PRODUCT", "Expanded", "FrozenLists", "frozen_conv", "frozen_linear"]

_NATIVE = _native.available("frozen_linear")
#: The operator itself, for those who have made sure that it can run; None where there is none.
NATIVE_PRODUCT: Callable[..., Tensor] | None = (
    torch.ops.rewire.frozen_linear.default if _NATIVE else None
)


class Expanded(NamedTuple):
    """A frozen weight as other products take it: one index list by row, and a float for each
    connection.
    """

    ptr: Tensor
    idx: Tensor
    slots: Tensor
    values: Tensor


class FrozenLists(NamedTuple):
    """A frozen weight: its connections, sorted by row.

    Attributes:
        ptr: connections of row r are at ``ptr[r] : ptr[r + 1]``; int32, or int64 from 2^31
            connections on.
        cols: the column of each; uint16 up to 65,536 columns, else int32 (int64 beyond 2^31).
        values: a number for each; int8 with a ``scale`` for each row. None: the weight is ternary.
            Then ``ptr`` has two entries for each row, and ``ptr[2 r + 1]`` parts the row's
            connections into those that are plus the scale and those that are minus it.
        scale: (rows,), with int8 and ternary weights.
    """

    ptr: Tensor
    cols: Tensor
    values: Tensor | None
    scale: Tensor | None

    def expand(self) -> Expanded:
        """The same with values in the dtype of ``scale``, if there is one. O(K)."""
        ptr, cols, values, scale = self
        count = cols.shape[0]
        wide = ptr.dtype == torch.int64 or cols.dtype == torch.int64
        kind = torch.int64 if wide else torch.int32
        lengths = ptr.diff()
        if scale is not None:
            parts = torch.stack([scale, -scale], 1).flatten() if values is None else scale
            each = torch.repeat_interleave(parts, lengths, output_size=count)
            values = each if values is None else values.to(scale.dtype) * each
            ptr = ptr[::2] if lengths.shape[0] != scale.shape[0] else ptr
        assert values is not None
        slots = torch.arange(count, dtype=kind, device=cols.device)
        return Expanded(ptr.to(kind), cols.to(kind), slots, values)


def frozen_linear(weight: FrozenLists, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` for a frozen weight.

    x: (batch, features) with any strides; the result is (batch, rows), row-major. Sums are float32
    for x of 16 bits, else of x's dtype. No gradients. Raises RuntimeError for dtypes and shapes
    that do not fit, and for a bad index. O(K batch) time, and for several rows of x a copy of at
    most 64 of them.
    """
    numbers = weight.values if weight.scale is None else weight.scale
    if (
        NATIVE_PRODUCT is not None
        and x.is_cpu
        and x.dtype == torch.float32
        and numbers is not None
        and numbers.dtype == torch.float32
        and weight.cols.dtype != torch.int64
    ):
        return NATIVE_PRODUCT(*weight, x, bias)
    return kernels.batch_major(kernels.spmm(*weight.expand(), x, bias))


def frozen_conv(weight: FrozenLists, x: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of ``x`` (batch, channels, ...) with a frozen weight, plus bias.

    As `rewire.ops.sparse_conv`, without gradients. Int8 and ternary values become floats in each
    call, which is O(K), while the product is O(K output positions batch).
    """
    x, geometry = gathered(x, geometry)
    *lists, values = weight.expand()
    return conv_kernels.conv(Lists(*lists), values, x, bias, geometry, is_channels_last(x))


if _NATIVE:
    flops.announce(["frozen_linear"])

    @kernels.fake("frozen_linear")
    def _(ptr: Tensor, cols: Tensor, values: Any, scale: Any, x: Tensor, bias: Any) -> Tensor:
        rows = ptr.shape[0] - 1 if scale is None else scale.shape[0]
        return x.new_empty((x.shape[0], rows))

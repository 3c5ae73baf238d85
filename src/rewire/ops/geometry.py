"""The arguments of a convolution, and the memory formats of its activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Geometry", "gathered", "is_channels_last", "memory_format"]

#: Strides and reaches of a kernel up to so many positions are never worth a look: what lies between
#: is little.
_WIDE = 64


class Geometry(NamedTuple):
    """Kernel, stride and dilation of each dimension; zero padding, low and high of each dimension;
    groups.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def output(self, sizes: Sequence[int]) -> list[int]:
        """Output size of each dimension for an input of ``sizes``; 0 where the kernel does not
        fit.
        """
        found = []
        for axis, size in enumerate(sizes):
            reach = self.dilation[axis] * (self.kernel[axis] - 1)
            room = size + self.padding[2 * axis] + self.padding[2 * axis + 1] - reach - 1
            found.append(0 if room < 0 else room // self.stride[axis] + 1)
        return found


def gathered(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """An input and a geometry of the same convolution, without positions that no connection reads,
    if most are so.

    Kernels lay out all that lies between the first and the last position that a row of outputs
    reads: with a stride or a dilation of millions, next to nothing of it counts. Then the positions
    that count, k * dilation + q * stride for every kernel position k and output q, are put side by
    side (zeros for padding), which makes the dilation the number of outputs. x: (batch, channels,
    ...). Differentiable. O(kernel x outputs) memory along each axis it changes.
    """
    stride, padding, dilation = (
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
    )
    changed = False
    for axis, kernel in enumerate(geometry.kernel):
        reach = dilation[axis] * (kernel - 1) + 1
        size = x.shape[2 + axis]
        if (stride[axis] <= _WIDE and reach <= _WIDE) or size == 0:
            continue
        low, high = padding[2 * axis : 2 * axis + 2]
        outputs = (size + low + high - reach) // stride[axis] + 1
        if 2 * kernel * outputs >= max((outputs - 1) * stride[axis] + reach, stride[axis]):
            continue
        taps = torch.arange(kernel, device=x.device) * dilation[axis] - low
        at = (taps.unsqueeze(1) + torch.arange(outputs, device=x.device) * stride[axis]).flatten()
        inside = ((at >= 0) & (at < size)).view(-1, *(1,) * (len(geometry.kernel) - axis - 1))
        # Not a product: what stands for padding must be 0 where x is infinite.
        x = torch.where(inside, x.index_select(2 + axis, at.clamp(0, size - 1)), 0)
        stride[axis], padding[2 * axis : 2 * axis + 2], dilation[axis] = 1, (0, 0), outputs
        changed = True
    if not changed:
        return x, geometry
    return x, geometry._replace(
        stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation)
    )


def memory_format(rank: int, channels_last: bool) -> torch.memory_format:
    """Of activations with ``rank`` dimensions beside batch and channels."""
    if not channels_last or rank == 1:
        return torch.contiguous_format
    return torch.channels_last if rank == 2 else torch.channels_last_3d


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` (batch, channels, ...) is channels-last and not contiguous as well; never for
    one dimension.
    """
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=memory_format(x.dim() - 2, True))

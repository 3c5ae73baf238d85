"""The arguments of a convolution, and the memory formats of its activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Geometry", "gathered", "is_channels_last", "memory_format", "planes"]

#: A kernel that reaches over at most so many positions, with a stride up to that, skips too little
#: for `gathered` to be worth its cost.
_WIDE = 64


class Geometry(NamedTuple):
    """The arguments of a convolution; kernel, stride and dilation have a number for each dimension.

    ``padding`` is of zeros: low and high of the first dimension, low and high of the second, ...
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
    """Input and geometry of the same convolution, with x reduced to the positions that it reads, if
    those are few.

    Kernels lay out everything between the first and the last position that a row of outputs reads;
    with a stride or a dilation of millions they read next to nothing of that. In such a case this
    puts the positions that they do read side by side: k * dilation + q * stride for every kernel
    position k and output q, with zeros for padding. The dilation then is the number of outputs.

    x: (batch, channels, ...). Differentiable. O(kernel x outputs) memory along each dimension that
    it changes.
    """
    stride, dilation = list(geometry.stride), list(geometry.dilation)
    padding = list(geometry.padding)
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
        # Not a product with `inside`: padding must be 0 even where x is infinite.
        x = torch.where(inside, x.index_select(2 + axis, at.clamp(0, size - 1)), 0)
        stride[axis], padding[2 * axis : 2 * axis + 2], dilation[axis] = 1, (0, 0), outputs
        changed = True
    if not changed:
        return x, geometry
    return x, geometry._replace(
        stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation)
    )


def planes(x: Tensor, geometry: Geometry) -> Tensor:
    """``x`` (batch, channels, ...), padded, as a view [channel, *kernel position, *output position,
    batch].

    Negative padding crops.
    """
    kernel, stride, padding, dilation, _ = geometry
    rank = len(kernel)
    x = F.pad(x, [p for a in reversed(range(rank)) for p in padding[2 * a : 2 * a + 2]])
    for axis in range(rank):
        x = x.unfold(2 + axis, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])
        x = x[..., :: dilation[axis]]
    return x.permute(1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank), 0)


def memory_format(rank: int, channels_last: bool) -> torch.memory_format:
    """Of activations with ``rank`` dimensions beside batch and channels."""
    if not channels_last or rank == 1:
        return torch.contiguous_format
    return torch.channels_last if rank == 2 else torch.channels_last_3d


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` (batch, channels, ...) is channels-last but not contiguous; False with one
    dimension behind the channels.
    """
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=memory_format(x.dim() - 2, True))

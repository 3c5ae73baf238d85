"""The arguments of a convolution, and the memory formats of its activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Geometry", "is_channels_last", "memory_format"]


class Geometry(NamedTuple):
    """Kernel, stride and dilation of each dimension; zero padding, low and high of each dimension; groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def output(self, sizes: Sequence[int]) -> list[int]:
        """Output size of each dimension for an input of ``sizes``; 0 where the kernel does not fit."""
        found = []
        for axis, size in enumerate(sizes):
            reach = self.dilation[axis] * (self.kernel[axis] - 1)
            room = size + self.padding[2 * axis] + self.padding[2 * axis + 1] - reach - 1
            found.append(0 if room < 0 else room // self.stride[axis] + 1)
        return found


def memory_format(rank: int, channels_last: bool) -> torch.memory_format:
    """Of activations with ``rank`` dimensions beside batch and channels."""
    if not channels_last or rank == 1:
        return torch.contiguous_format
    return torch.channels_last if rank == 2 else torch.channels_last_3d


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` (batch, channels, ...) is channels-last and not contiguous as well; never for one dimension."""
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=memory_format(x.dim() - 2, True))

"""`SparseConv1d`, `SparseConv2d`, `SparseConv3d`: the twins of `torch.nn.Conv*d` with a connection
budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import cleandoc
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewire import ops
from rewire.budget import Limits
from rewire.nn.layers.base import SparseLayer
from rewire.nn.layers.initial import Init
from rewire.nn.weight.pool import SparseWeight

__all__ = ["SparseConv1d", "SparseConv2d", "SparseConv3d"]

Size = int | Sequence[int]
_MODES = ("zeros", "reflect", "replicate", "circular")
_Self = TypeVar("_Self", bound="_SparseConv")


class _SparseConv(SparseLayer):
    """A convolution over ``_rank`` dimensions with a weight of exactly ``connections`` connections.

    Arguments are those of the layer's twin in `torch.nn`, plus:
        connections, density: the budget, exactly one of them; a connection is one number of the
            dense weight (out_channels, in_channels / groups, *kernel_size), of which there are M.
        capacity: slots of the pool (K by default), see `SparseWeight`.
        limits: most connections of an output channel, of an input (a channel at one position of the
            kernel) and of a block of the matrix of output channels by inputs, see
            `rewire.budget.Limits`.
        generator: draws topology, values and bias; torch's default generator otherwise.
        init: how large the first values are: "auto", "dense" or "sparse", see `reset_parameters`.

    Shapes: input (batch, in_channels, ...) or (in_channels, ...) with any strides, output (batch,
    out_channels, ...) or (out_channels, ...), channels-last if the input is. The first values give
    an output the variance that it has in the twin, see `reset_parameters`.

    Under autocast the result has autocast's dtype; values and sums keep the weight's dtype. If
    ``padding_mode`` is not "zeros", ``weight.capture`` collects the padded input.

    Cost: O(K * output positions * batch) time in each of the three products, O(K) memory and a few
    MiB per thread besides activations; padding modes other than zeros keep a padded copy of the
    input.
    """

    _rank: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        connections: int | None = None,
        density: float | None = None,
        capacity: int | None = None,
        limits: Limits | None = None,
        generator: torch.Generator | None = None,
        init: Init = "auto",
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must be at least 1 and divide in_channels and out_channels, but {groups} "
                f"groups were given for {in_channels} and {out_channels} channels"
            )
        weight = SparseWeight(
            (out_channels, in_channels // groups, *self._sizes("kernel_size", kernel_size, 1)),
            connections,
            density=density,
            capacity=capacity,
            limits=limits,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self._assemble(weight, bias, stride, padding, dilation, groups, padding_mode)
        self.reset_parameters(generator, init=init)

    @classmethod
    def from_weight(
        cls: type[_Self],
        weight: SparseWeight,
        bias: Tensor | None = None,
        *,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> _Self:
        """A layer around an existing pool (out_channels, in_channels / groups, *kernel_size).

        ``bias`` (out_channels,) is copied.
        """
        if len(weight.shape) != cls._rank + 2:
            raise ValueError(
                f"{cls.__name__} needs a {cls._rank + 2}-D weight, not {tuple(weight.shape)}"
            )
        if groups < 1 or weight.shape[0] % groups:
            raise ValueError(
                f"groups must divide the {weight.shape[0]} output channels, but is {groups}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._assemble(weight, bias, stride, padding, dilation, groups, padding_mode)
        return self

    def _assemble(
        self,
        weight: SparseWeight,
        bias: bool | Tensor | None,
        stride: Size,
        padding: Size | str,
        dilation: Size,
        groups: int,
        padding_mode: str,
    ) -> None:
        if padding_mode not in _MODES:
            raise ValueError(
                f"padding_mode must be one of {', '.join(_MODES)}, not {padding_mode!r}"
            )
        self.in_channels, self.out_channels = weight.shape[1] * groups, weight.shape[0]
        self.groups = groups
        self.kernel_size = tuple(weight.shape[2:])
        self.stride = self._sizes("stride", stride, 1)
        self.dilation = self._sizes("dilation", dilation, 1)
        self.padding = padding if isinstance(padding, str) else self._sizes("padding", padding, 0)
        self.padding_mode = padding_mode
        zeros = self._padding()
        self._pad: tuple[int, ...] | None = None
        if padding_mode != "zeros" and any(zeros):
            # F.pad counts dimensions from the last one.
            self._pad = tuple(
                p for axis in reversed(range(self._rank)) for p in zeros[2 * axis : 2 * axis + 2]
            )
            zeros = (0,) * len(zeros)
        self._geometry = ops.Geometry(self.kernel_size, self.stride, zeros, self.dilation, groups)
        self._hold(weight, bias)

    @classmethod
    def _sizes(cls, name: str, given: Size, least: int) -> tuple[int, ...]:
        sizes = (given,) * cls._rank if isinstance(given, int) else tuple(int(n) for n in given)
        if len(sizes) != cls._rank or min(sizes) < least:
            raise ValueError(
                f"{name} must be a number or {cls._rank} numbers, each at least {least}, not "
                f"{given}"
            )
        return sizes

    def _padding(self) -> tuple[int, ...]:
        """Low and high padding of each dimension."""
        if not isinstance(self.padding, str):
            return tuple(p for size in self.padding for p in (size, size))
        if self.padding == "valid":
            return (0, 0) * self._rank
        if self.padding != "same":
            raise ValueError(f"padding must be numbers, 'same' or 'valid', not {self.padding!r}")
        if any(s != 1 for s in self.stride):
            raise ValueError(f"padding='same' needs stride 1, not {self.stride}")
        # As in torch.nn, an odd number goes to the high end.
        totals = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        return tuple(p for total in totals for p in (total // 2, total - total // 2))

    def pair(self, x: Tensor, y: Tensor) -> ops.Pair:
        if y.dim() == self._rank + 1:
            x, y = x.unsqueeze(0), y.unsqueeze(0)
        if self._pad is not None:
            x = F.pad(x, self._pad, mode=self.padding_mode)
        return ops.Pair(x, y, self._geometry)

    def _product(self, x: Tensor) -> Tensor:
        if x.dim() == self._rank + 1:
            return self._product(x.unsqueeze(0)).squeeze(0)
        if x.dim() != self._rank + 2:
            raise RuntimeError(
                f"x has shape {tuple(x.shape)}, but {type(self).__name__} takes "
                f"({self.in_channels}{', ...' * self._rank}), with or without a batch in front"
            )
        if self._pad is not None:
            x = F.pad(x, self._pad, mode=self.padding_mode)
        return self._convolved(x)

    def _convolved(self, x: Tensor) -> Tensor:
        """The convolution of ``x`` with a batch in front, padded where zeros are not what pads."""
        weight = self.weight
        values, index = weight.operand()
        return ops.sparse_conv(x, values, self.bias, index, self._geometry, weight.capture)

    def extra_repr(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        ]
        if isinstance(self.padding, str) or any(self.padding):
            parts.append(f"padding={self.padding}")
        if any(d != 1 for d in self.dilation):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        return ", ".join([*parts, f"bias={self.bias is not None}", self._budget_repr()])


_DESCRIPTION = cleandoc(_SparseConv.__doc__ or "")


class SparseConv1d(_SparseConv):
    __doc__ = f"The twin of `torch.nn.Conv1d`: (batch, channels, length).\n\n{_DESCRIPTION}"
    _rank, rows_axis = 1, -2


class SparseConv2d(_SparseConv):
    __doc__ = f"The twin of `torch.nn.Conv2d`: (batch, channels, height, width).\n\n{_DESCRIPTION}"
    _rank, rows_axis = 2, -3


class SparseConv3d(_SparseConv):
    __doc__ = (
        f"The twin of `torch.nn.Conv3d`: (batch, channels, depth, height, width).\n\n{_DESCRIPTION}"
    )
    _rank, rows_axis = 3, -4

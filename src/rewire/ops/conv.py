"""The differentiable sparse convolution: three autograd.Functions over the kernels, whose gradients
are made of the three again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewire.ops.conv_kernels import conv, conv_input_gradient, conv_value_gradient
from rewire.ops.geometry import Geometry, gathered, is_channels_last
from rewire.ops.pairs import Capture, Pair
from rewire.ops.transforms import refuse_transforms, transformed
from rewire.ops.versions import check_versions, remember_versions
from rewire.topology import Index, Lists

__all__ = ["sparse_conv"]

Gradients = tuple[Tensor | None, ...]
#: The gradients of the six lists of the index: there are none.
_LISTS = (None,) * 6


def _by_row(index: Sequence[Tensor]) -> Lists:
    return Lists(index[0], index[1], index[2])


def _by_col(index: Sequence[Tensor]) -> Lists:
    return Lists(index[3], index[4], index[5])


def _recorded(*tensors: Tensor) -> bool:
    """Whether a backward pass must itself be differentiable (``create_graph=True``).

    Never while a compiler traces: it differentiates the traced kernels once only, and raises an
    error of its own for more.
    """
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
    )


class _Conv(torch.autograd.Function):
    """y = conv(x, W) + bias; bilinear in x and the values."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        capture: Capture | None,
        *lists: Tensor,
    ) -> Tensor:
        # A compiled graph cannot fill a list.
        ctx.geometry, ctx.capture = geometry, None if torch.compiler.is_compiling() else capture
        # Everything that backward reads is saved here, so autograd raises if any of it has changed.
        ctx.save_for_backward(x, values, *lists)
        remember_versions(ctx, values, lists[0])
        return conv(_by_row(lists), values, x, bias, geometry, is_channels_last(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Gradients:
        check_versions(ctx)
        x, values, *lists = ctx.saved_tensors
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        if ctx.capture is not None and need_values:
            ctx.capture.append(Pair(x.detach(), g.detach(), ctx.geometry))
        grad_x = _input_gradient(g, values, lists, x, ctx.geometry, ctx.capture) if need_x else None
        grad_values = (
            _value_gradient(g, x, values.shape[0], lists, ctx.geometry) if need_values else None
        )
        grad_bias = g.sum((0, *range(2, g.dim()))) if need_bias else None
        return grad_x, grad_values, grad_bias, None, None, *_LISTS


class _InputGradient(torch.autograd.Function):
    """The gradient of the input; bilinear in g and the values."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        values: Tensor,
        inputs: int,
        sizes: tuple[int, ...],
        channels_last: bool,
        geometry: Geometry,
        capture: Capture | None,
        *lists: Tensor,
    ) -> Tensor:
        ctx.geometry, ctx.capture = geometry, capture
        ctx.save_for_backward(g, values, *lists)
        return conv_input_gradient(
            _by_col(lists), values, g, sizes, inputs, geometry, channels_last
        )

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Gradients:
        g, values, *lists = ctx.saved_tensors
        need_g, need_values = ctx.needs_input_grad[:2]
        if ctx.capture is not None and need_values:
            ctx.capture.append(Pair(h.detach(), g.detach(), ctx.geometry))
        grad_g = _forward(h, values, lists, ctx.geometry, ctx.capture) if need_g else None
        grad_values = (
            _value_gradient(g, h, values.shape[0], lists, ctx.geometry) if need_values else None
        )
        return grad_g, grad_values, None, None, None, None, None, *_LISTS


class _ValueGradient(torch.autograd.Function):
    """The gradient of the values; bilinear in g and x."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, capacity: int, geometry: Geometry, *lists: Tensor
    ) -> Tensor:
        ctx.geometry = geometry
        ctx.save_for_backward(g, x, *lists)
        return conv_value_gradient(_by_row(lists), capacity, g, x, geometry)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Gradients:
        g, x, *lists = ctx.saved_tensors
        need_g, need_x = ctx.needs_input_grad[:2]
        grad_g = _forward(x, h, lists, ctx.geometry) if need_g else None
        grad_x = _input_gradient(g, h, lists, x, ctx.geometry) if need_x else None
        return grad_g, grad_x, None, None, *_LISTS


def _forward(
    x: Tensor,
    values: Tensor,
    lists: list[Tensor],
    geometry: Geometry,
    capture: Capture | None = None,
) -> Tensor:
    if _recorded(x, values):
        y: Tensor = _Conv.apply(x, values, None, geometry, capture, *lists)  # type: ignore[no-untyped-call]
        return y
    return conv(_by_row(lists), values, x, None, geometry, is_channels_last(x))


def _input_gradient(
    g: Tensor,
    values: Tensor,
    lists: list[Tensor],
    x: Tensor,
    geometry: Geometry,
    capture: Capture | None = None,
) -> Tensor:
    """In the shape and memory format of ``x``."""
    inputs, sizes, last = x.shape[1], tuple(x.shape[2:]), is_channels_last(x)
    if _recorded(g, values):
        out: Tensor = _InputGradient.apply(  # type: ignore[no-untyped-call]
            g, values, inputs, sizes, last, geometry, capture, *lists
        )
        return out
    return conv_input_gradient(_by_col(lists), values, g, sizes, inputs, geometry, last)


def _value_gradient(
    g: Tensor, x: Tensor, capacity: int, lists: list[Tensor], geometry: Geometry
) -> Tensor:
    if _recorded(g, x):
        out: Tensor = _ValueGradient.apply(g, x, capacity, geometry, *lists)  # type: ignore[no-untyped-call]
        return out
    return conv_value_gradient(_by_row(lists), capacity, g, x, geometry)


def sparse_conv(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Index,
    geometry: Geometry,
    capture: Capture | None = None,
) -> Tensor:
    """The convolution of ``x`` with the sparse weight that ``values`` (capacity,) and ``index``
    describe, plus bias.

    As a matrix the weight is (output channels) by (input channels / groups x kernel positions).
    ``x`` is (batch, channels, d1, ...), with one to three dimensions as in ``geometry``, in any
    strides; the result is channels-last if x is, else contiguous. If ``capture`` is given and the
    values need a gradient, backward appends a `Pair` of x and the gradient of the output to it.
    Differentiable to any order (once under `torch.compile`). Raises RuntimeError for dtypes and
    shapes that do not fit.

    Cost: O(K * output positions * batch) time for the product and for each gradient. Backward keeps
    x itself, or what the kernel reads of it, if strides or dilations pass over most of x.
    """
    if not torch.compiler.is_compiling() and transformed():
        raise refuse_transforms()
    rank = len(geometry.kernel)
    if x.dtype != values.dtype:
        raise RuntimeError(
            f"x is {x.dtype} but the weight's values are {values.dtype}: convert one, so that both "
            "agree"
        )
    columns = index.col_ptr.shape[0] - 1
    if x.dim() != rank + 2 or x.shape[1] * math.prod(geometry.kernel) != columns * geometry.groups:
        channels = columns // math.prod(geometry.kernel) * geometry.groups
        raise RuntimeError(
            f"x has shape {tuple(x.shape)}, but the layer takes (batch, {channels}{', ...' * rank})"
        )
    if not all(geometry.output(x.shape[2:])):
        raise RuntimeError(
            f"the kernel {geometry.kernel} with dilation {geometry.dilation} is larger than the "
            f"padded input {tuple(x.shape[2:])} with padding {geometry.padding}"
        )
    x, geometry = gathered(x, geometry)
    y: Tensor = _Conv.apply(x, values, bias, geometry, capture, *index)  # type: ignore[no-untyped-call]
    return y

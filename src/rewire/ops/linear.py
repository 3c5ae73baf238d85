"""The differentiable product of a sparse weight with a batch: one autograd.Function over the
kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rewire.ops.kernels import batch_major, feature_major, in_panels, sddmm, spmm, spmm_sddmm
from rewire.ops.pairs import Capture, Pair, exchanged
from rewire.ops.transforms import refuse_transforms, transformed
from rewire.ops.versions import check_versions, remember_versions
from rewire.topology import Index

__all__ = ["NARROW", "sparse_linear"]

#: Dtypes of 16 bits that the products take; the arithmetic is that of float32.
NARROW = (torch.bfloat16, torch.float16)

#: The gradients of the arguments of `_Linear` behind x, values and bias: there are none.
_NO_GRADIENTS = (None,) * 8

#: Inputs of at most so many numbers are saved as they come: the kernels then copy them, which costs
#: less than separate calls.
_SMALL = 4096

#: From so many values on, and for runs of x of at most so many bytes, the two gradients are
#: computed one after the other: writing the values' gradient by column, a line of memory at a time,
#: then costs more than reading x again.
_MANY, _SHORT = 1 << 24, 256


def _in_runs(x: Tensor) -> Tensor:
    """``x`` with the batch contiguous (strides (1, batch) or alike), copied only if it is not."""
    return x if x.stride(0) == 1 or x.shape[0] == 1 else feature_major(x)


def _small(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and x.numel() <= _SMALL


def _together(x: Tensor, values: Tensor) -> bool:
    """Whether both gradients are computed in one walk."""
    if torch.compiler.is_compiling():
        return True  # a compiled graph must not depend on the size of a batch
    return values.shape[0] < _MANY or x.shape[0] * x.element_size() > _SHORT


def _apply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Iterable[Tensor],
    capture: Capture | None = None,
    contiguous_output: bool = False,
) -> Tensor:
    y: Tensor
    if torch.compiler.is_compiling():
        y = _Linear.apply(x, values, bias, capture, contiguous_output, *index)[0]  # type: ignore[no-untyped-call]
        return y
    try:
        y = _Packed.apply(x, values, bias, index, capture, contiguous_output)[0]  # type: ignore[no-untyped-call]
    except RuntimeError:
        if transformed():
            raise refuse_transforms() from None
        raise
    return y


def _pair(x: Tensor, g: Tensor, values: Tensor) -> Pair:
    x, g = (_in_runs(t.detach().to(values.dtype)) for t in (x, g))
    return Pair(x, g)


def _plus(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


class _Linear(torch.autograd.Function):
    """y = x W^T + bias.

    The transposed product is the same Function with the two index lists exchanged, and the gradient
    of the values is `_Sample`, so derivatives of any order are made of these two. If x had to be
    copied to make its batch contiguous, the copy is a second output: saved as such, it keeps its
    place in the graph, which second derivatives need.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        capture: Capture | None,
        contiguous_output: bool,
        *lists: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        panels = in_panels(x)
        runs = x if panels or _small(x) else _in_runs(x)
        y = spmm(lists[0], lists[1], lists[2], values, runs, bias, panels)
        ctx.set_materialize_grads(False)
        ctx.panels, ctx.copied = panels, runs is not x
        # A compiled graph cannot fill a list.
        ctx.capture = None if torch.compiler.is_compiling() else capture
        # Everything that backward reads is saved here, so autograd raises if any of it has changed.
        ctx.save_for_backward(runs, values, *lists)
        remember_versions(ctx, values, lists[0])
        if contiguous_output and not panels:
            y = batch_major(y)
        return y, None if runs is x else runs

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, grad_runs: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return grad_runs, None, None, *_NO_GRADIENTS
        check_versions(ctx)
        x, values, row_ptr, row_cols, row_slots, col_ptr, col_rows, col_slots = ctx.saved_tensors
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        panels = ctx.panels
        if torch.compiler.is_compiling():
            # Strides are not known while backward is traced; this copies nothing where they are
            # right.
            g = g if panels else g.t().contiguous().t()
        elif torch.is_grad_enabled() and (
            g.requires_grad or x.requires_grad or values.requires_grad
        ):
            return _differentiable_backward(ctx, g, grad_runs)
        elif not panels and not _small(g):
            g = _in_runs(g)
        if ctx.capture is not None and need_values:
            ctx.capture.append(_pair(x, g, values))
        grad_x = grad_values = None
        if need_x and need_values and _together(x, values):
            grad_x, grad_values = spmm_sddmm(col_ptr, col_rows, col_slots, values, x, g, panels)
        else:
            if need_x:
                grad_x = spmm(col_ptr, col_rows, col_slots, values, g, None, panels)
            if need_values:
                grad_values = sddmm(row_ptr, row_cols, row_slots, values.shape[0], g, x, panels)
        if grad_x is not None:
            grad_x = _plus(grad_x, grad_runs)
            if ctx.copied and not torch.compiler.is_compiling():
                # What made a row-major x needs a row-major gradient, and would copy more slowly.
                grad_x = batch_major(grad_x)
        if grad_values is not None and grad_values.dtype != values.dtype:
            grad_values = grad_values.to(values.dtype)
        grad_bias = g.sum(0, dtype=values.dtype) if need_bias else None
        return grad_x, grad_values, grad_bias, *_NO_GRADIENTS


class _Packed(torch.autograd.Function):
    """`_Linear` with the index as one argument: autograd spends time on every tensor argument."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        index: Iterable[Tensor],
        *rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        return _Linear.forward(ctx, x, values, bias, *rest, *index)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, grad_runs: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Linear.backward(ctx, g, grad_runs)[:6]


class _Sample(torch.autograd.Function):
    """out[slot of (r, c)] = sum over b of g[b, r] x[b, c], linear in g and in x."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, capacity: int, *index: Tensor) -> Tensor:
        ctx.save_for_backward(g, x, *index)
        return sddmm(index[0], index[1], index[2], capacity, g, x, in_panels(x))

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        g, x, *lists = ctx.saved_tensors
        by_row, by_col = lists[:3], lists[3:]
        grad_g = _apply(x, h, None, by_row + by_col) if ctx.needs_input_grad[0] else None
        grad_x = _apply(g, h, None, by_col + by_row) if ctx.needs_input_grad[1] else None
        return grad_g, grad_x, None, *(None,) * 6


def _differentiable_backward(
    ctx: Any, g: Tensor, grad_runs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Backward under ``create_graph=True``."""
    x, values, *lists = ctx.saved_tensors
    by_row, by_col = lists[:3], lists[3:]
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    if ctx.capture is not None and need_values:
        ctx.capture.append(_pair(x, g, values))
    grad_x = grad_values = None
    if need_x:
        grad_x = _apply(g, values, None, by_col + by_row, exchanged(ctx.capture))
        grad_x = _plus(grad_x, grad_runs)
    if need_values:
        grad_values = _Sample.apply(g, x, values.shape[0], *by_row, *by_col)  # type: ignore[no-untyped-call]
        grad_values = grad_values.to(values.dtype)
    grad_bias = g.sum(0, dtype=values.dtype) if need_bias else None
    return grad_x, grad_values, grad_bias, *_NO_GRADIENTS


def sparse_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Index,
    capture: Capture | None = None,
    contiguous_output: bool = False,
) -> Tensor:
    """``x W^T + bias`` for the sparse weight W that ``values`` (capacity,) and ``index`` describe.

    Args:
        x: (..., in_features) with any strides. If it has 16 bits (`NARROW`), values may be float32:
            then sums and the gradient of the values are float32, the result and the gradient of x
            have 16 bits.
        capture: if given, and the values need a gradient, backward appends a `Pair` of x and the
            gradient of the output to it, both (batch, features) in the values' dtype with the batch
            contiguous.
        contiguous_output: return row-major memory.

    Returns (..., out_features). For 2-D x its strides are (1, batch), in which the next sparse
    layer needs no copy, unless ``contiguous_output``. A row-major x of many rows (`in_panels`)
    gives row-major results. Differentiable to any order. Raises RuntimeError for dtypes and shapes
    that do not fit.

    Cost: O(K batch) time. Backward keeps x: as it is if it has many rows, else with its batch
    contiguous, which may be a copy.
    """
    if x.dtype != values.dtype and (values.dtype != torch.float32 or x.dtype not in NARROW):
        raise RuntimeError(
            f"x is {x.dtype} but the weight's values are {values.dtype}: convert one, so that both "
            "agree"
        )
    in_features = index.col_ptr.shape[0] - 1
    if not x.dim() or x.shape[-1] != in_features:
        raise RuntimeError(
            f"x has shape {tuple(x.shape)}, but the layer takes (..., {in_features})"
        )
    if x.dim() == 2:
        return _apply(x, values, bias, index, capture, contiguous_output)
    if x.dim() == 1:
        return _apply(x.unsqueeze(0), values, bias, index, capture, contiguous_output).squeeze(0)
    # Not reshape with a product of sizes: an exported program would take the product for a
    # constant.
    flat = _apply(x.flatten(0, -2), values, bias, index, capture, contiguous_output)
    return flat.view(*x.shape[:-1], index.row_ptr.shape[0] - 1)

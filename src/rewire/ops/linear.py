"""The differentiable product of a sparse weight with a batch: one autograd.Function over the
kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rewire.ops.kernels import batch_major, feature_major, sddmm, spmm, spmm_sddmm
from rewire.ops.pairs import Capture, Pair, exchanged
from rewire.ops.transforms import refuse_transforms, transformed
from rewire.ops.versions import check_versions, remember_versions
from rewire.topology import Index

__all__ = ["NARROW", "sparse_linear"]

#: Dtypes of 16 bits that the products take; they are computed with as float32.
NARROW = (torch.bfloat16, torch.float16)

#: What backward hands back for the arguments of `_Linear` behind x, values and bias.
_NO_GRADIENTS = (None,) * 8


#: Inputs up to this many numbers are saved as they come: the kernels' own copies cost less than
#: calls that make them.
_SMALL = 4096


def _in_runs(x: Tensor) -> Tensor:
    """``x`` with the batch contiguous (strides (1, batch) or alike), copied only if it is not."""
    return x if x.stride(0) == 1 or x.shape[0] == 1 else feature_major(x)


def _small(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and x.numel() <= _SMALL


#: From so many values on, and for runs of x of at most so many bytes, both gradients are computed
#: one after the other: writing the values' gradient by column, a line of memory at a time, then
#: costs more than reading x again.
_MANY, _SHORT = 1 << 24, 256


def _together(x: Tensor, values: Tensor) -> bool:
    """Whether both gradients are computed in one walk. (A compiled graph must not depend on the
    size of a batch.)
    """
    if torch.compiler.is_compiling():
        return True
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
        y = _Linear.apply(x, values, bias, *index, capture, contiguous_output)[0]  # type: ignore[no-untyped-call]
        return y
    try:
        y = _Packed.apply(x, values, bias, index, capture, contiguous_output)[0]  # type: ignore[no-untyped-call]
    except RuntimeError:
        if transformed():
            raise refuse_transforms() from None
        raise
    return y


def _plus(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


class _Linear(torch.autograd.Function):
    """y = x W^T + bias.

    The transposed product is the same Function with the two index lists exchanged, and the gradient
    of the values is `_Sample`, so derivatives of any order are made of these two. A copy of x with
    the batch contiguous is a second output: saved as such, it keeps its place in the graph, which a
    second derivative needs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        row_ptr: Tensor,
        row_cols: Tensor,
        row_slots: Tensor,
        col_ptr: Tensor,
        col_rows: Tensor,
        col_slots: Tensor,
        capture: Capture | None,
        contiguous_output: bool,
    ) -> tuple[Tensor, Tensor | None]:
        runs = x if _small(x) else _in_runs(x)
        y = spmm(row_ptr, row_cols, row_slots, values, runs, bias)
        ctx.set_materialize_grads(False)
        ctx.copied = runs is not x
        # A compiled graph cannot fill a list.
        ctx.capture = None if torch.compiler.is_compiling() else capture
        # Everything that backward reads goes through here: autograd then raises if any of it was
        # changed since.
        ctx.save_for_backward(
            runs, values, row_ptr, row_cols, row_slots, col_ptr, col_rows, col_slots
        )
        remember_versions(ctx, values, row_ptr)
        return batch_major(y) if contiguous_output else y, None if runs is x else runs

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, grad_runs: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return grad_runs, None, None, *_NO_GRADIENTS
        check_versions(ctx)
        x, values, row_ptr, row_cols, row_slots, col_ptr, col_rows, col_slots = ctx.saved_tensors
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        if torch.compiler.is_compiling():
            # Strides are not known while backward is traced; where they prove right this copies
            # nothing.
            g = g.t().contiguous().t()
        elif torch.is_grad_enabled() and (
            g.requires_grad or x.requires_grad or values.requires_grad
        ):
            return _differentiable_backward(ctx, g, grad_runs)
        elif not _small(g):
            g = _in_runs(g)
        if ctx.capture is not None and need_values:
            ctx.capture.append(
                Pair(_in_runs(x.detach().to(values.dtype)), _in_runs(g.detach().to(values.dtype)))
            )
        grad_x = grad_values = None
        if need_x and need_values and _together(x, values):
            grad_x, grad_values = spmm_sddmm(col_ptr, col_rows, col_slots, values, x, g)
        else:
            if need_x:
                grad_x = spmm(col_ptr, col_rows, col_slots, values, g)
            if need_values:
                grad_values = sddmm(row_ptr, row_cols, row_slots, values.shape[0], g, x)
        if grad_x is not None:
            grad_x = _plus(grad_x, grad_runs)
            if ctx.copied and not torch.compiler.is_compiling():
                # Whatever made an ordinary x wants an ordinary gradient, and copies it more slowly.
                grad_x = batch_major(grad_x)
        if grad_values is not None and grad_values.dtype != values.dtype:
            grad_values = grad_values.to(values.dtype)
        grad_bias = g.sum(0, dtype=values.dtype) if need_bias else None
        return grad_x, grad_values, grad_bias, *_NO_GRADIENTS


class _Packed(torch.autograd.Function):
    """`_Linear` with the index as one argument: autograd looks at every tensor among its arguments,
    each time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        index: Iterable[Tensor],
        capture: Capture | None,
        contiguous_output: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rest: list[Any] = [*index, capture, contiguous_output]
        return _Linear.forward(ctx, x, values, bias, *rest)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, grad_runs: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Linear.backward(ctx, g, grad_runs)[:6]


class _Sample(torch.autograd.Function):
    """out[slot of (r, c)] = sum over b of g[b, r] x[b, c], linear in g and in x."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, capacity: int, *index: Tensor) -> Tensor:
        ctx.save_for_backward(g, x, *index)
        return sddmm(index[0], index[1], index[2], capacity, g, x)

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
        ctx.capture.append(
            Pair(_in_runs(x.detach().to(values.dtype)), _in_runs(g.detach().to(values.dtype)))
        )
    grad_x = (
        _plus(_apply(g, values, None, by_col + by_row, exchanged(ctx.capture)), grad_runs)
        if need_x
        else None
    )
    grad_values = None
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

    ``x`` is (..., in_features) with any strides. The result is (..., out_features); for 2-D x its
    strides are (1, batch) (the layout in which the next sparse layer needs no copy), or ordinary
    ones with ``contiguous_output``. Activations of 16 bits (`NARROW`) may go with float32 values:
    sums are float32, results and gradients of activations of 16 bits, that of the values float32.
    If ``capture`` is given and values want a gradient, backward appends to it a `Pair` of x and the
    gradient of the output, both (batch, features) in the values' dtype with the batch contiguous.
    Differentiable to any order. O(K batch) time; beyond the result, keeps x for backward, as a copy
    unless its batch is contiguous already.
    """
    if x.dtype != values.dtype and (values.dtype != torch.float32 or x.dtype not in NARROW):
        raise RuntimeError(
            f"x is {x.dtype} but the weight's values are {values.dtype}: convert one, so that "
            "both agree"
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
    # flatten, not reshape to a product of sizes: an exported program would take that product for a
    # constant.
    flat = _apply(x.flatten(0, -2), values, bias, index, capture, contiguous_output)
    return flat.view(*x.shape[:-1], index.row_ptr.shape[0] - 1)

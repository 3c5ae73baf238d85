"""The products: native kernels where they can run, else plain PyTorch (`rewire.ops.reference`).

``ptr``, ``idx``, ``slots`` are one index list (docs/architecture.md): by row for ``y = W x``, by
column for the gradient of the input. ``x`` is (batch, features) with any strides. If x has 16 bits
a number, values and bias may be float32; sums are float32 in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewire import _native
from rewire.ops import flops, reference

__all__ = ["fake", "sddmm", "spmm", "spmm_sddmm"]

_NATIVE = _native.available("spmm")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _operator(name: str) -> Any:
    """The native operator. Looked up once, because that takes as long as a small product."""
    return getattr(torch.ops.rewire, name).default if _NATIVE else None


_SPMM: Callable[..., Tensor] | None = _operator("spmm")
_SDDMM: Callable[..., Tensor] | None = _operator("sddmm")
_SPMM_SDDMM: Callable[..., tuple[Tensor, Tensor]] | None = _operator("spmm_sddmm")


def spmm(
    ptr: Tensor,
    idx: Tensor,
    slots: Tensor,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    feature_major: bool = False,
) -> Tensor:
    """``y[b, r] = bias[r] + sum of values[slots[i]] * x[b, idx[i]]`` over the connections i of row
    r.

    ``values`` is (capacity,), ``bias`` (rows,); y is (batch, rows), row-major, or with
    strides (1, batch) if ``feature_major``. Raises RuntimeError on a bad index. O(K batch) time.
    """
    if _SPMM is not None and x.is_cpu and x.dtype in _DTYPES:
        return _SPMM(ptr, idx, slots, values, x, bias, feature_major)
    flops.note("spmm", ptr, idx, slots, values, x)
    return reference.spmm(ptr, idx, slots, values, x, bias, feature_major)


def sddmm(ptr: Tensor, idx: Tensor, slots: Tensor, capacity: int, g: Tensor, x: Tensor) -> Tensor:
    """``out[slots[i]] = sum over b of g[b, r] * x[b, idx[i]]`` over the connections i of row r;
    else zero.

    ``g`` is (batch, rows), out is (capacity,), float32 for g and x of 16 bits. Raises RuntimeError
    on a bad index. O(K batch) time.
    """
    if _SDDMM is not None and x.is_cpu and x.dtype in _DTYPES:
        return _SDDMM(ptr, idx, slots, capacity, g, x)
    flops.note("sddmm", ptr, idx, slots, capacity, g)
    return reference.sddmm(ptr, idx, slots, capacity, g, x)


def spmm_sddmm(
    ptr: Tensor,
    idx: Tensor,
    slots: Tensor,
    values: Tensor,
    g: Tensor,
    x: Tensor,
    feature_major: bool = False,
) -> tuple[Tensor, Tensor]:
    """``spmm(ptr, idx, slots, values, x, None, feature_major)`` and ``sddmm(ptr, idx, slots,
    capacity, g, x)`` from one reading of x.

    With the list by column, x the gradient of a layer's output and g its input, these are the
    gradients of the input and of the values. Raises RuntimeError on a bad index. O(K batch) time,
    about 0.7 of that of the two.
    """
    if _SPMM_SDDMM is not None and x.is_cpu and x.dtype in _DTYPES:
        return _SPMM_SDDMM(ptr, idx, slots, values, g, x, feature_major)
    flops.note("spmm_sddmm", ptr, idx, slots, values, g)
    return reference.spmm_sddmm(ptr, idx, slots, values, g, x, feature_major)


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for functions that tell the compiler what the native operator ``name`` returns:
    an empty tensor of the right shape, strides and dtype.
    """
    register: Callable[[Callable[..., Any]], Callable[..., Any]]
    register = torch.library.register_fake(f"rewire::{name}")
    return register


if _NATIVE:
    flops.announce(["spmm", "sddmm", "spmm_sddmm"])

    def _sums(ptr: Tensor, x: Tensor, feature_major: bool) -> Tensor:
        batch, rows = x.shape[0], ptr.shape[0] - 1
        return x.new_empty((rows, batch)).t() if feature_major else x.new_empty((batch, rows))

    @fake("spmm")
    def _(
        ptr: Tensor,
        idx: Tensor,
        slots: Tensor,
        values: Tensor,
        x: Tensor,
        bias: Tensor | None,
        feature_major: bool = False,
    ) -> Tensor:
        return _sums(ptr, x, feature_major)

    @fake("sddmm")
    def _(ptr: Tensor, idx: Tensor, slots: Tensor, capacity: int, g: Tensor, x: Tensor) -> Tensor:
        return x.new_empty((capacity,), dtype=reference.sum_dtype(x.dtype))

    @fake("spmm_sddmm")
    def _(
        ptr: Tensor,
        idx: Tensor,
        slots: Tensor,
        values: Tensor,
        g: Tensor,
        x: Tensor,
        feature_major: bool = False,
    ) -> tuple[Tensor, Tensor]:
        dots = x.new_empty(values.shape, dtype=reference.sum_dtype(x.dtype))
        return _sums(ptr, x, feature_major), dots

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

__all__ = ["batch_major", "fake", "feature_major", "in_panels", "sddmm", "spmm", "spmm_sddmm"]

#: From so many rows of a row-major batch on, products go through panels (`in_panels`). Measured on
#: 1024 x 1024 and 512 x 2048 at 1 and 10 %, forward and backward over those of a copied batch, one
#: thread: 0.8 to 0.9 times as fast at 128 rows, 0.9 to 1.4 at 192, 1.1 to 1.5 at 256, 1.4 to 1.9 at
#: 512, 1.7 to 2.7 at 1,024 and 2.5 to 3 at 8,192. Below 512 there are too few panels for threads.
PANEL_ROWS = 512

_NATIVE = _native.available("spmm")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _operator(name: str) -> Any:
    """The native operator. Looked up once, because that takes as long as a small product."""
    return getattr(torch.ops.rewire, name).default if _NATIVE else None


_SPMM: Callable[..., Tensor] | None = _operator("spmm")
_SDDMM: Callable[..., Tensor] | None = _operator("sddmm")
_SPMM_SDDMM: Callable[..., tuple[Tensor, Tensor]] | None = _operator("spmm_sddmm")
_FEATURE_MAJOR: Callable[..., Tensor] | None = _operator("feature_major")
_BATCH_MAJOR: Callable[..., Tensor] | None = _operator("batch_major")


def _runs_natively(x: Tensor) -> bool:
    return _NATIVE and x.is_cpu and x.dtype in _DTYPES


def in_panels(x: Tensor) -> bool:
    """Whether products should go through panels of ``x`` (batch, features): it is row-major and
    has many rows.

    Kernels then bring a few rows at a time into a core's own cache and the layout they need, and
    write results as rows, so that no copy of a whole activation is made. While a graph is compiled,
    only where its number of rows does not decide.
    """
    if not _runs_natively(x) or x.stride(0) == 1:
        return False
    if not torch.compiler.is_compiling():
        return x.shape[0] >= PANEL_ROWS
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(x.shape[0] >= PANEL_ROWS)


def spmm(
    ptr: Tensor,
    idx: Tensor,
    slots: Tensor,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    panels: bool = False,
    runs: bool = False,
) -> Tensor:
    """``y[b, r] = bias[r] + sum of values[slots[i]] * x[b, idx[i]]`` over the connections i of row
    r.

    ``values`` is (capacity,), ``bias`` (rows,); y is (batch, rows) with strides (1, batch), or
    row-major if it is computed in ``panels`` and not wanted in ``runs``. Raises RuntimeError on a
    bad index. O(K batch) time.
    """
    if _SPMM is not None and x.is_cpu and x.dtype in _DTYPES:
        return _SPMM(ptr, idx, slots, values, x, bias, panels, runs)
    flops.note("spmm", ptr, idx, slots, values, x)
    return reference.spmm(ptr, idx, slots, values, x, bias)


def sddmm(
    ptr: Tensor,
    idx: Tensor,
    slots: Tensor,
    capacity: int,
    g: Tensor,
    x: Tensor,
    panels: bool = False,
) -> Tensor:
    """``out[slots[i]] = sum over b of g[b, r] * x[b, idx[i]]`` over the connections i of row r;
    else zero.

    ``g`` is (batch, rows), out is (capacity,), float32 for g and x of 16 bits. Raises RuntimeError
    on a bad index. O(K batch) time.
    """
    if _SDDMM is not None and x.is_cpu and x.dtype in _DTYPES:
        return _SDDMM(ptr, idx, slots, capacity, g, x, panels)
    flops.note("sddmm", ptr, idx, slots, capacity, g)
    return reference.sddmm(ptr, idx, slots, capacity, g, x)


def spmm_sddmm(
    ptr: Tensor,
    idx: Tensor,
    slots: Tensor,
    values: Tensor,
    g: Tensor,
    x: Tensor,
    panels: bool = False,
) -> tuple[Tensor, Tensor]:
    """``spmm(ptr, idx, slots, values, x)`` and ``sddmm(ptr, idx, slots, capacity, g, x)`` from one
    reading of x.

    With the list by column, x the gradient of a layer's output and g its input, these are the
    gradients of the input and of the values. Raises RuntimeError on a bad index. O(K batch) time,
    about 0.7 of that of the two.
    """
    if _SPMM_SDDMM is not None and x.is_cpu and x.dtype in _DTYPES:
        return _SPMM_SDDMM(ptr, idx, slots, values, g, x, panels)
    flops.note("spmm_sddmm", ptr, idx, slots, values, g)
    return reference.spmm_sddmm(ptr, idx, slots, values, g, x)


def feature_major(x: Tensor) -> Tensor:
    """A copy of ``x`` (batch, features) with strides (1, batch)."""
    if _FEATURE_MAJOR is not None and x.is_cpu and x.dtype in _DTYPES:
        return _FEATURE_MAJOR(x)
    return reference.feature_major(x)


def batch_major(x: Tensor) -> Tensor:
    """A row-major contiguous copy of ``x`` (batch, features)."""
    if _BATCH_MAJOR is not None and x.is_cpu and x.dtype in _DTYPES:
        return _BATCH_MAJOR(x)
    return reference.batch_major(x)


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for functions that tell the compiler what the native operator ``name`` returns:
    an empty tensor of the right shape, strides and dtype.
    """
    register: Callable[[Callable[..., Any]], Callable[..., Any]]
    register = torch.library.register_fake(f"rewire::{name}")
    return register


if _NATIVE:
    flops.announce(["spmm", "sddmm", "spmm_sddmm"])

    def _sums(ptr: Tensor, x: Tensor, row_major: bool) -> Tensor:
        shape = (x.shape[0], ptr.shape[0] - 1)
        strides = (shape[1], 1) if row_major else (1, shape[0])
        return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)

    @fake("spmm")
    def _(
        ptr: Tensor,
        idx: Tensor,
        slots: Tensor,
        values: Tensor,
        x: Tensor,
        bias: Tensor | None,
        panels: bool = False,
        runs: bool = False,
    ) -> Tensor:
        return _sums(ptr, x, panels and not runs)

    @fake("sddmm")
    def _(
        ptr: Tensor,
        idx: Tensor,
        slots: Tensor,
        capacity: int,
        g: Tensor,
        x: Tensor,
        panels: bool = False,
    ) -> Tensor:
        return x.new_empty((capacity,), dtype=reference.sum_dtype(x.dtype))

    @fake("spmm_sddmm")
    def _(
        ptr: Tensor,
        idx: Tensor,
        slots: Tensor,
        values: Tensor,
        g: Tensor,
        x: Tensor,
        panels: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return _sums(ptr, x, panels), x.new_empty(values.shape, dtype=reference.sum_dtype(x.dtype))

    @fake("feature_major")
    def _(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, (1, x.shape[0]), dtype=x.dtype, device=x.device)

    @fake("batch_major")
    def _(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, (x.shape[1], 1), dtype=x.dtype, device=x.device)

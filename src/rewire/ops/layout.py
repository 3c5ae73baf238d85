"""Differentiable changes of memory layout; the gradient passes through unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewire.ops import kernels
from rewire.ops.transforms import refuse_transforms, transformed

__all__ = ["for_products", "in_rows", "in_runs"]


class _Copied(torch.autograd.Function):
    """A copy with the batch contiguous, or in rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: bool) -> Tensor:
        return kernels.batch_major(x) if rows else kernels.feature_major(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def _copied(x: Tensor, rows: bool) -> Tensor:
    if not torch.compiler.is_compiling() and transformed():
        raise refuse_transforms()
    out: Tensor = _Copied.apply(x, rows)  # type: ignore[no-untyped-call]
    return out


def in_runs(x: Tensor) -> Tensor:
    """``x`` (batch, features) with the batch contiguous (strides (1, batch)); a copy only if it is
    not so already.
    """
    return x if x.stride(0) == 1 or x.shape[0] == 1 else _copied(x, rows=False)


def for_products(x: Tensor) -> Tensor:
    """``x`` (batch, features) in a layout that several products can read without copies of their
    own: as it is if they go through panels of it, else with the batch contiguous.
    """
    return x if kernels.in_panels(x) else in_runs(x)


def in_rows(x: Tensor) -> Tensor:
    """``x`` (batch, features) in row-major memory, as dense layers and `.view` expect it; a copy
    only if it is not so already.
    """
    return x if x.is_contiguous() else _copied(x, rows=True)

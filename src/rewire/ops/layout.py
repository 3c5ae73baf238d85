"""Differentiable changes of memory layout: the numbers stay, so the gradient passes through as it
is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewire.ops import kernels
from rewire.ops.transforms import refuse_transforms, transformed

__all__ = ["in_rows", "in_runs"]


class _Runs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return kernels.feature_major(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return kernels.batch_major(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def in_runs(x: Tensor) -> Tensor:
    """``x`` (batch, features) with the batch contiguous, strides (1, batch) or alike; a copy only
    if it is not.

    For an input that several sparse products share: they then need no copies of their own.
    """
    if x.stride(0) == 1 or x.shape[0] == 1:
        return x
    if not torch.compiler.is_compiling() and transformed():
        raise refuse_transforms()
    out: Tensor = _Runs.apply(x)  # type: ignore[no-untyped-call]
    return out


def in_rows(x: Tensor) -> Tensor:
    """``x`` (batch, features) in ordinary row-major memory, as dense layers and `.view` expect
    it.
    """
    if x.is_contiguous():
        return x
    if not torch.compiler.is_compiling() and transformed():
        raise refuse_transforms()
    out: Tensor = _Rows.apply(x)  # type: ignore[no-untyped-call]
    return out

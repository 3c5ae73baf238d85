"""Random walks: DEEP R's pass over one pool (noise, L1 and the sign test), and noise alone."""

from __future__ import annotations

import torch
from torch import Tensor

from rewire import _native, random

__all__ = ["add_normal_", "langevin_step_"]


def langevin_step_(
    values: Tensor,
    rows: Tensor,
    signs: Tensor,
    shrink: float,
    noise: float,
    seed: int,
    step: int,
    stream: int,
) -> Tensor:
    """theta <- theta - shrink + noise * nu on every active slot, in place; return the slots with
    theta < 0.

    ``theta = signs * values`` and ``nu_k`` is `rewire.random.normal` number k. The slots returned
    (int64, ascending) have the value 0 now; empty slots (rows == -1) stay as they are. values: (C,)
    float. rows: (C,) int. signs: (C,) int8 of +-1. One streaming pass; nothing is drawn if ``noise
    == 0``.
    """
    if _native.available() and values.is_cpu and values.dtype in (torch.float32, torch.float64):
        dropped: Tensor = torch.ops.rewire.langevin_step_(
            values, rows, signs, shrink, noise, seed, step, stream
        )
        return dropped
    sign = signs.to(values.dtype)
    theta = sign * values - shrink
    if noise:
        theta = theta + noise * random.normal(seed, step, stream, values.numel(), values.device).to(
            values.dtype
        )
    active = rows >= 0
    drop = active & (theta < 0)
    values.copy_(torch.where(active & ~drop, sign * theta, torch.zeros_like(theta)))
    return drop.nonzero().flatten()


def add_normal_(values: Tensor, scale: float, seed: int, step: int, stream: int) -> None:
    """``values[k] += scale *`` number k of `rewire.random.normal`, in place; values 1-D, of any
    dtype.
    """
    native = _native.available("add_normal_") and values.is_cpu and values.is_contiguous()
    if native and values.dtype in (torch.float32, torch.float64):
        torch.ops.rewire.add_normal_(values, scale, seed, step, stream)
    else:
        values += scale * random.normal(seed, step, stream, values.numel(), values.device)

"""Corrects the steps of Adam and its relatives for connections younger than the optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewire import _native

__all__ = ["Tables", "age_step_"]


class Tables(NamedTuple):
    """The factors of an update by age, from age 1 on (see `age_step_`): four 1-D tensors of one
    dtype and length.
    """

    m: Tensor
    g: Tensor
    root: Tensor
    eps: Tensor


#: Looked up once, because that takes as long as the step of a small pool.
_NATIVE: Any = torch.ops.rewire.age_step_.default if _native.available("age_step_") else None


def _is_native(values: Tensor, *others: Tensor) -> bool:
    """Whether the native step takes these: on the CPU, contiguous, in one of its dtypes."""
    dtype = values.dtype
    if _NATIVE is None or not values.is_cpu or dtype not in (torch.float32, torch.float64):
        return False
    for tensor in others:
        if tensor.dtype != dtype or not tensor.is_contiguous():
            return False
    return values.is_contiguous()


def age_step_(
    ages: Tensor,
    values: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor | None,
    tables: Tables,
    own: tuple[float, float, float, float],
    *,
    lr: float,
    decay: float,
    maximize: bool,
    squared: bool,
    horizon: int,
) -> int:
    """Replace the update of young connections (``ages != -1``) by the update for their own age.

    The optimizer's step has subtracted ``lr u`` from a value w, with ::

        u(m, g, root, eps) = (g (+-gradient + decay w) + m first) / (root sqrt(second) + eps)

    so this adds ``lr (u(own) - u(tables at the age))`` to young values, in place, and makes them
    one step older. At age ``horizon`` a connection is old: its age becomes -1. Returns how many
    connections are still young.

    Args:
        ages: (C,) int16, read as unsigned, or int32.
        values, first, second, gradient: (C,), as the step left them; no gradient if table ``g`` is
            not needed.
        tables: at least as long as the oldest age or ``horizon``.
        own: the same four factors in the step just made.
        squared: whether the square root of ``second`` is taken.

    Cost: a pass over the ages, and over the young connections.
    """
    if (
        _is_native(values, first, second if gradient is None else gradient, second)
        and ages.is_contiguous()
    ):
        moments = first, second, gradient
        young: int = _NATIVE(
            ages, values, *moments, *tables, *own, lr, decay, maximize, squared, horizon
        )
        return young
    slots = (ages != -1).nonzero().flatten()
    wide = tables.m.dtype
    age = ages[slots].long()
    if ages.dtype == torch.int16:
        age &= 0xFFFF
    # The table begins with age 1, and a connection that has just grown makes its first step now.
    at = age.clamp(max=tables.m.numel() - 1)
    variance, momentum, now = (t.detach()[slots].to(wide) for t in (second, first, values))
    root = variance.sqrt() if squared else variance
    m, g, scale, eps = own
    here, there = scale * root + eps, tables.root[at] * root + tables.eps[at]
    if gradient is None:
        new = now + lr * (m * momentum / here - tables.m[at] * momentum / there)
    else:
        slope = gradient.detach()[slots].to(wide) * (-1 if maximize else 1)
        old = (now + lr * (g * slope + m * momentum) / here) / (1 - lr * g * decay / here)
        slope = slope + decay * old
        own_update = (g * slope + m * momentum) / here
        new = now + lr * (own_update - (tables.g[at] * slope + tables.m[at] * momentum) / there)
    values.detach()[slots] = new.to(values.dtype)
    age += 1
    ages[slots] = age.masked_fill_(age >= horizon, -1).to(ages.dtype)
    return int((age != -1).sum())

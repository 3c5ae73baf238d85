"""The step of Adam and its relatives for connections that are younger than the optimizer: put right
after it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewire import _native

__all__ = ["Tables", "age_step_"]


class Tables(NamedTuple):
    """By age (from 1), what a step makes of moments: see `age_step_`. Four 1-D tensors of one dtype
    and length.
    """

    m: Tensor
    g: Tensor
    root: Tensor
    eps: Tensor


#: Looked up once: a look-up takes as long as a small pool's step.
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
    """Move young connections (``ages != -1``) from where a step of all led to where one of their
    own age leads.

    A step takes ``lr u`` from a value that was w before, with ::

        u(m, g, root, eps) = (g (+-gradient + decay w) + m first) / (root sqrt(second) + eps)

    so ``lr (u(own) - u(tables at the age))`` is added to young values, in place, and they become
    one step older. From age ``horizon`` on they are old: -1. Returns how many are young still.

    Args:
        ages: (C,) int16, read as unsigned, or int32. values, first, second, gradient: (C,), as the
            step left them.
        gradient: None where no table ``g`` is needed.
        tables: as long as the oldest age, at least, or ``horizon``. own: the same four numbers of
            the step just made.
        squared: whether the square root of ``second`` is taken.

    Cost: a pass over the ages, and the young.
    """
    if (
        _is_native(values, first, second if gradient is None else gradient, second)
        and ages.is_contiguous()
    ):
        young: int = _NATIVE(
            ages,
            values,
            first,
            second,
            gradient,
            *tables,
            *own,
            lr,
            decay,
            maximize,
            squared,
            horizon,
        )
        return young
    slots = (ages != -1).nonzero().flatten()
    wide = tables.m.dtype
    age = ages[slots].long()
    if ages.dtype == torch.int16:
        age &= 0xFFFF
    # the table begins with age 1, which is a newborn's now
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

"""The step of Adam and its relatives for connections that are younger than the optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rewire import _native

__all__ = ["Tables", "age_step_", "young_values"]


class Tables(NamedTuple):
    """By age (from 1), what a step makes of moments: see `age_step_`. Four 1-D tensors of one dtype and length."""

    m: Tensor
    g: Tensor
    root: Tensor
    eps: Tensor


def young_values(ages: Tensor, values: Tensor) -> Tensor:
    """The values of connections that are young (``ages != -1``), in the order of the slots; a copy."""
    if _is_native(ages, values):
        young: Tensor = torch.ops.rewire.young_values(ages, values)
        return young
    return values.detach()[ages != -1]


def _is_native(ages: Tensor, values: Tensor) -> bool:
    fits = values.is_cpu and ages.is_cpu and values.dtype in (torch.float32, torch.float64)
    return fits and values.is_contiguous() and ages.is_contiguous() and _native.available("age_step_")


def age_step_(
    ages: Tensor,
    values: Tensor,
    before: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor | None,
    tables: Tables,
    *,
    lr: float,
    shrink: float,
    decay: float,
    maximize: bool,
    squared: bool,
    horizon: int,
) -> None:
    """Young connections (``ages != -1``) become one step older, and their values, which were ``before``, become ::

        shrink before - lr (g[age] (+-gradient + decay before) + m[age] first) / (root[age] sqrt(second) + eps[age])

    in place. From age ``horizon`` on they are old: -1.

    Args:
        ages: (C,) int16, read as unsigned, or int32. values, first, second, gradient: (C,). before: (young,).
        gradient: None where no table ``g`` is needed.
        tables: as long as the oldest age, at least, or ``horizon``.
        squared: whether the square root of ``second`` is taken.

    Cost: a pass over the ages, and the young.
    """
    lists = (before, first, second, *tables) if gradient is None else (before, first, second, gradient, *tables)
    if _is_native(ages, values) and all(t.dtype == values.dtype and t.is_contiguous() for t in lists):
        torch.ops.rewire.age_step_(
            ages, values, before, first, second, gradient, *tables, lr, shrink, decay, maximize, squared, horizon
        )
        return
    slots = (ages != -1).nonzero().flatten()
    wide = tables.m.dtype
    age = ages[slots].long()
    if ages.dtype == torch.int16:
        age &= 0xFFFF
    at = age.clamp_(max=tables.m.numel() - 1)  # the table begins with age 1, which is a newborn's now
    old = before.to(wide)
    variance = second.detach()[slots].to(wide)
    below = tables.root[at] * (variance.sqrt() if squared else variance) + tables.eps[at]
    new = shrink * old
    if gradient is not None:
        g = gradient.detach()[slots].to(wide)
        new -= lr * tables.g[at] * ((-g if maximize else g) + decay * old) / below
    new -= lr * tables.m[at] * first.detach()[slots].to(wide) / below
    values.detach()[slots] = new.to(values.dtype)
    age += 1
    ages[slots] = age.masked_fill_(age >= horizon, -1).to(ages.dtype)

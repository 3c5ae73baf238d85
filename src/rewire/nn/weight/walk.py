"""The changes that DEEP R makes in every step, each in one native call."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from rewire.nn.weight.pool import SparseWeight
from rewire.ops import regrow_, walk_and_regrow_

__all__ = ["regrow", "walk"]


def regrow(weight: SparseWeight, slots: Tensor, signs: Tensor, **drawn: Any) -> None:
    """Drop ``slots`` and grow as many random dormant connections there, at zeros with a sign.

    This does what `SparseWeight.rewire` would do with connections from
    `rewire.topology.sample_dormant`, in one pass. Call it under `torch.no_grad`.

    Args:
        signs: int8, (capacity,); the new connections' signs are written here.
        drawn: seed, step and streams; these and errors as in `rewire.ops.regrow_`.
    """
    if not slots.numel():
        return
    _check(weight, "regrow")
    rows, cols = weight.rows, weight.cols
    k = regrow_(weight.values.detach(), signs, rows, cols, weight.index, slots, **drawn)
    weight.changed(slots, connections=k)


def walk(weight: SparseWeight, signs: Tensor, shrink: float, noise: float, **drawn: Any) -> Tensor:
    """A step of DEEP R: `rewire.ops.langevin_step_` on the values, then `regrow` in the slots that
    crossed zero.

    Returns those slots (int64, ascending). ``drawn`` and errors as in
    `rewire.ops.walk_and_regrow_`. Call it under `torch.no_grad`.
    """
    _check(weight, "walk")
    # This runs in every step, so it avoids the attribute look-ups of torch.nn.Module.
    values, b = weight.stored_values(), weight._buffers
    rows: Any = b["rows"]
    cols: Any = b["cols"]
    index, gradient = weight.index, values.grad
    slots = walk_and_regrow_(values, signs, rows, cols, index, gradient, shrink, noise, **drawn)
    if slots.shape[0]:
        weight.changed(slots, cleared=True)
    else:
        increment_version(values)
    return slots


def _check(weight: SparseWeight, what: str) -> None:
    if weight.before_change is not None:
        weight.before_change()
    if weight.bound:
        kept = " and ".join(str(k) for k in (weight.limits, weight.prior) if k is not None)
        raise ValueError(
            f"{what} draws from all dormant connections, and this weight is limited to {kept}"
        )

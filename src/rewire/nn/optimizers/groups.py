"""Parameter groups of an optimizer for a model with sparse weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rewire.nn.weight.listing import sparse_weights

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module, weight_decay: float, *, decay_sparse: bool = True
) -> list[dict[str, Any]]:
    """Two optimizer groups: sparse values and tensors of two or more dimensions with
    ``weight_decay``, other parameters without.

    The values of a sparse weight are 1-D, so the usual rule "no decay for 1-D parameters" would
    leave them out. ``decay_sparse=False`` leaves them out, for methods that forbid decay of sparse
    values, such as DEEP R.
    """
    pools = {id(weight.values) for _, weight in sparse_weights(model)}
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 or (decay_sparse and id(parameter) in pools)
            (decayed if decays else plain).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]

"""What the optimizer would remember of dormant connections if it saw their gradients: the
straight-through option.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from rewire.methods.core.base import Pool
from rewire.methods.criteria.topk import Gradients, recorded

__all__ = ["DenseMoments"]

_Rule = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]


def _momentum(old: Tensor, g: Tensor, group: Mapping[str, Any]) -> Tensor:
    return old.mul_(group["momentum"]).add_(g, alpha=1 - group["dampening"])


def _first(old: Tensor, g: Tensor, group: Mapping[str, Any]) -> Tensor:
    return old.lerp_(g, 1 - group["betas"][0])


def _second(old: Tensor, g: Tensor, group: Mapping[str, Any]) -> Tensor:
    return old.mul_(group["betas"][1]).addcmul_(g, g, value=1 - group["betas"][1])


def _rules(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, _Rule]:
    if isinstance(optimizer, (Adam, AdamW)) and not group["amsgrad"]:
        return {"exp_avg": _first, "exp_avg_sq": _second}
    if isinstance(optimizer, SGD):
        return {"momentum_buffer": _momentum} if group["momentum"] else {}
    raise ValueError(
        "moments='dense' knows what SGD, Adam and AdamW (without amsgrad) keep, not "
        f"{type(optimizer).__name__}: use one of these, or moments='cleared'"
    )


class DenseMoments:
    """The optimizer's state of all positions of one pool, updated with their gradients as the
    optimizer would.

    As in LSNN's code (IGITUGraz/LSNN-official, rewiring_tools.py), where the optimizer is handed
    the gradient of every potential connection, so that one which grows begins with smooth moments.
    There dormant parameters are set back to 0 after the optimizer's step (against reconnecting by
    momentum alone); here they have none. Gradients have the scale of those that the optimizer used
    (averaged over ranks, unscaled, clipped by norm). Memory O(M) per state tensor and for one
    gradient, time O(M batch) per step.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool, self.name = pool, pool.name
        self._rules = _rules(pool.optimizer, pool.group)
        weight = pool.weight
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.kept = {
            key: torch.zeros(weight.size, dtype=kind, device=weight.device) for key in self._rules
        }

    @property
    def wanted(self) -> bool:
        """Whether there is anything to keep (plain SGD has no state)."""
        return bool(self._rules)

    def update(self) -> None:
        """Take in the recorded step: ``state <- rule(state, gradient)`` at every position. Raises
        RuntimeError if its gradients are not known.
        """
        scale = recorded(self._pool).scale()
        gradient = Gradients(self._pool).block(0, self._pool.weight.matrix_shape[0]) * scale
        for key, rule in self._rules.items():
            rule(self.kept[key], gradient.flatten().to(self.kept[key]), self._pool.group)

    def give(self, slots: Tensor) -> None:
        """Let the connections that have just grown in ``slots`` begin with what is kept of their
        positions.
        """
        weight = self._pool.weight
        state = self._pool.optimizer.state.get(weight.values, {})
        position = self._pool.keys(slots)
        for key, kept in self.kept.items():
            if key in state and isinstance(state[key], Tensor):
                state[key][slots] = kept[position].to(state[key])

"""A network and its optimizers' state at one moment, to go back to, whatever shapes it has by
then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from rewire.nn.structure import Part, announce
from rewire.nn.surgery import load_resized

__all__ = ["Snapshot"]


def _copy(value: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)


class Snapshot:
    """Values of a model's state_dict and, optimizer state by parameter name; the groups' options
    are not part of it.
    """

    def __init__(self, model: dict[str, Any], optimizer: dict[str, Any], parameters: int) -> None:
        self._model, self._optimizer = model, optimizer
        #: How many numbers the network's parameters have.
        self.parameters = parameters

    @classmethod
    def of(cls, model: nn.Module, optimizers: Iterable[Optimizer]) -> Snapshot:
        """Copy what there is now."""
        state: dict[str, Any] = {}
        for optimizer in optimizers:
            for name, parameter in model.named_parameters():
                if optimizer.state.get(parameter):
                    state[name] = _copy(dict(optimizer.state[parameter]))
        return cls(
            _copy(dict(model.state_dict())), state, sum(p.numel() for p in model.parameters())
        )

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Put model and optimizer state back; parameters stay the same objects and gradients of
        other shapes go.
        """
        load_resized(model, self._model)
        for parameter in model.parameters():
            # an average of what came later is none of this network
            announce(parameter, [Part(parameter)])
        for optimizer in optimizers:
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, parameter in model.named_parameters():
                if id(parameter) in trained:
                    optimizer.state.pop(parameter, None)
                    if name in self._optimizer:
                        optimizer.state[parameter] = _copy(self._optimizer[name])
            if hasattr(optimizer, "_numel_cache"):  # LBFGS counts once
                optimizer._numel_cache = None

    def state(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts, for a method's state_dict."""
        return {
            "model": _copy(self._model),
            "optimizer": _copy(self._optimizer),
            "parameters": self.parameters,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Snapshot:
        """The inverse of `state`."""
        return cls(
            _copy(dict(state["model"])), _copy(dict(state["optimizer"])), int(state["parameters"])
        )

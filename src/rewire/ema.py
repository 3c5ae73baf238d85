"""Exponential moving averages of weights that follow their connections."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rewire.nn import Event, sparse_weights

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage:
    """``average <- decay * average + (1 - decay) * parameter`` over every parameter of a model.

    Unlike `torch.optim.swa_utils.AveragedModel`, which averages slot by slot whatever the slots hold, this one follows
    rewiring: the average of a new connection starts at its new value, moved and resized pools move their averages.

    Args:
        model: averaged; its pools are followed until `detach`.
        decay: in [0, 1).

    Cost: one more number per parameter; O(parameters) per update.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be at least 0 and below 1, not {decay}")
        self.decay = decay
        self._model = model
        self._average: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.named_parameters()}
        here = weakref.ref(self)
        self._handles = [
            weight.follow(lambda event, name=name: _tell(here, name, event)) for name, weight in _named(model)
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into the average; call after each optimizer (and method) step."""
        for name, parameter in self._model.named_parameters():
            self._average[name].lerp_(parameter.detach().to(self._average[name]), 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with averaged weights inside the ``with``, its own afterwards. Do not rewire inside."""
        own = {n: p.detach().clone() for n, p in self._model.named_parameters()}
        self.copy_to(self._model)
        try:
            yield self._model
        finally:
            with torch.no_grad():
                for name, parameter in self._model.named_parameters():
                    parameter.copy_(own[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into a model of the same structure and topology (a deepcopy, say)."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self._average[name])

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, and the decay."""
        return {"decay": self.decay, "average": {n: t.clone() for n, t in self._average.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; ValueError if the names or shapes are not this model's (load the model first)."""
        new = state["average"]
        shapes = {n: p.shape for n, p in self._model.named_parameters()}
        if {n: t.shape for n, t in new.items()} != shapes:
            raise ValueError("these averages belong to another model: names or shapes differ; load the model first")
        self.decay = float(state["decay"])
        self._average = {n: t.detach().clone() for n, t in new.items()}

    def detach(self) -> None:
        """Stop following the model's pools."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _follow(self, name: str, event: Event) -> None:
        values = event.weight.values.detach().to(self._average[name])
        if event.loaded:
            self._average[name] = values.clone()
            return
        average = self._average[name]
        if event.source is not None:
            source = event.source
            average = torch.where(source >= 0, average[source.clamp(min=0)], average.new_zeros(()))
        average[event.slots] = values[event.slots]
        self._average[name] = average


def _named(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Pools by the name of their values in ``named_parameters``, which lists shared ones once."""
    names = {n for n, _ in model.named_parameters()}
    found = ((f"{n}.values" if n else "values", w) for n, w in sparse_weights(model))
    return ((n, w) for n, w in found if n in names)


def _tell(average: weakref.ref[ExponentialMovingAverage], name: str, event: Event) -> None:
    here = average()
    if here is not None:
        here._follow(name, event)

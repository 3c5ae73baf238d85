"""Optimizers follow the pools they train: state moves with the connections and starts afresh with new ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rewire.nn.events import Event

if TYPE_CHECKING:
    from rewire.nn.weight import SparseWeight

__all__ = [
    "OptimizerFollower",
    "carry_optimizer_state",
    "check_optimizer",
    "follow_optimizer",
    "gathered",
    "register_initial_state",
    "reset_optimizer_state",
]

#: What a per-connection state tensor starts at, where that is not 0: a function of the parameter group.
_INITIAL: dict[tuple[str, str], Callable[[dict[str, Any]], float]] = {
    ("Rprop", "step_size"): lambda group: float(group["lr"]),
    ("Adagrad", "sum"): lambda group: float(group["initial_accumulator_value"]),
}

#: Optimizers whose state or update rule is not one number per connection.
_REFUSED = {
    "LBFGS": "its history mixes all connections, so one of them cannot start afresh",
    "Muon": "it orthogonalises 2-D matrices, and a pool's values are 1-D",
    "SparseAdam": "it takes sparse gradients, and a pool's gradient is dense over its slots",
}


def register_initial_state(optimizer: str, key: str, value: Callable[[dict[str, Any]], float]) -> None:
    """Declare that state ``key`` of the optimizer class named ``optimizer`` starts at ``value(param_group)``, not at 0.

    For optimizers from other packages; those of `torch.optim` are known.
    """
    _INITIAL[optimizer, key] = value


def _known_name(optimizer: Optimizer, table: Iterable[str]) -> str | None:
    names = set(table)
    return next((c.__name__ for c in type(optimizer).__mro__ if c.__name__ in names), None)


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer that cannot train a pool, by name and with the reason."""
    name = _known_name(optimizer, _REFUSED)
    if name:
        raise ValueError(
            f"{name} cannot train sparse weights: {_REFUSED[name]}; use it for the dense parameters "
            "and another optimizer, such as SGD or Adam, for the sparse ones"
        )


def _per_slot(optimizer: Optimizer, parameter: Tensor, length: int) -> Iterable[tuple[str, Tensor, float]]:
    """State tensors with one number per slot: (key, tensor, initial value)."""
    state = optimizer.state.get(parameter)
    if not state:
        return
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    classes = [c.__name__ for c in type(optimizer).__mro__]
    for key, value in list(state.items()):
        if isinstance(value, Tensor) and value.dim() == 1 and value.numel() == length:
            rule = next((_INITIAL[c, key] for c in classes if (c, key) in _INITIAL), None)
            # A pool with one slot: a step counter is 0-dim in torch.optim, so a 1-D tensor is state all the same.
            yield key, value, rule(group) if rule else 0.0


def reset_optimizer_state(optimizer: Optimizer, parameter: Tensor, slots: Tensor) -> None:
    """Put the optimizer's state of ``slots`` to its initial value, which is not always 0."""
    for _, value, initial in _per_slot(optimizer, parameter, parameter.numel()):
        value.index_fill_(0, slots, initial)


def carry_optimizer_state(optimizer: Optimizer, parameter: Tensor, source: Tensor) -> None:
    """Move per-slot state as the pool moved: slot k takes what slot ``source[k]`` had, -1 starts afresh.

    State whose length is already the pool's new one is taken to have been carried before.
    """
    state = optimizer.state.get(parameter, {})
    lengths = {v.numel() for v in state.values() if isinstance(v, Tensor) and v.dim() == 1}
    for length in lengths - {source.numel()}:
        for key, value, initial in _per_slot(optimizer, parameter, length):
            state[key] = gathered(value, source, initial)


def gathered(value: Tensor, source: Tensor, initial: float, *, full: bool = False) -> Tensor:
    """Number k is what ``value`` has at ``source[k]`` (int64); ``initial`` where that is -1 (nowhere, if ``full``)."""
    if full:
        return value.detach().index_select(0, source)
    if not value.numel():
        return value.new_full((source.numel(),), initial)
    return value.detach().index_select(0, source.clamp(min=0)).masked_fill_(source < 0, initial)


#: The last event that reached each optimizer: where two of us follow for one (a user and a method), the second one must
#: not move its state again.
_DONE: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Event]] = weakref.WeakKeyDictionary()


class OptimizerFollower:
    """Keeps one optimizer in step with the pools it follows. Holds the optimizer weakly."""

    def __init__(self, optimizer: Optimizer) -> None:
        check_optimizer(optimizer)
        self._optimizer = weakref.ref(optimizer)

    def __call__(self, event: Event) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        parameter = event.weight.values
        if not optimizer.state.get(parameter):  # plain SGD, or no step yet
            return
        done = _DONE.get(optimizer)
        if done is not None and done() is event:
            return
        _DONE[optimizer] = weakref.ref(event)
        if event.loaded:
            # Loading leaves optimizer state to optimizer.load_state_dict, before or after; state of another length
            # belongs to the pool that was there before, and is created anew.
            state = optimizer.state.get(parameter, {})
            if any(isinstance(v, Tensor) and v.dim() == 1 and v.numel() != parameter.numel() for v in state.values()):
                del optimizer.state[parameter]
            return
        if event.source is not None:
            for _, value, initial in _per_slot(optimizer, parameter, event.source.numel()):
                full = event.weight.connections == event.source.numel()
                value.copy_(gathered(value, event.source, initial, full=full))
            carry_optimizer_state(optimizer, parameter, event.source)
        if event.slots.numel():
            reset_optimizer_state(optimizer, parameter, event.slots)


def follow_optimizer(optimizer: Optimizer, weights: Iterable[SparseWeight]) -> list[RemovableHandle]:
    """Let ``optimizer`` follow every pool that it trains; returns the handles that end it."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    follower = OptimizerFollower(optimizer)
    return [w.follow(follower) for w in weights if id(w.values) in trained]

"""Optimizers follow the sparse weights they train: state moves with connections, and starts afresh
for new ones.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rewire.nn.optimizers.ages import Ages, Moments, cannot_age, looks_biased, start_ages
from rewire.nn.optimizers.wrappers import (
    Kept,
    inner_optimizers,
    is_plain,
    kept_beside,
    movers,
    refuse_unknown,
    shares_storage,
)
from rewire.nn.weight.events import Event

if TYPE_CHECKING:
    from rewire.nn.weight.pool import SparseWeight

__all__ = [
    "OptimizerFollower",
    "carry_optimizer_state",
    "check_optimizer",
    "follow_optimizer",
    "following",
    "gathered",
    "initial_of",
    "register_initial_state",
    "reset_optimizer_state",
    "restart_optimizer_state",
]

#: The initial value of state that has a number for each connection, if it is not 0: a function of
#: the parameter group, or "values" for a copy of the connection's own value.
_INITIAL: dict[tuple[str, str], Callable[[dict[str, Any]], float] | Literal["values"]] = {
    ("Rprop", "step_size"): lambda group: float(group["lr"]),
    ("Adagrad", "sum"): lambda group: float(group["initial_accumulator_value"]),
    ("AdamWScheduleFree", "z"): "values",
    ("RAdamScheduleFree", "z"): "values",
    ("SGDScheduleFree", "z"): "values",
}

#: Names of state that is a copy of values (slow weights, master weights), not a moment of
#: gradients.
_COPY = re.compile(r"slow|master|anchor|old_p$|p0$|(^|_)(param|weight|value)s?(_|$)")

#: Of each optimizer, the names of state that was equal to the values when it began to follow:
#: copies of them, therefore.
_COPIES: weakref.WeakKeyDictionary[Optimizer, set[str]] = weakref.WeakKeyDictionary()

#: Optimizers that cannot train sparse weights, and why.
_REFUSED = {
    "LBFGS": "its history mixes all connections, so one of them cannot start afresh",
    "Muon": "it orthogonalises 2-D matrices, and a pool's values are 1-D",
    "SparseAdam": "it takes sparse gradients, and a pool's gradient is dense over its slots",
}


def register_initial_state(
    optimizer: str, key: str, value: Callable[[dict[str, Any]], float] | Literal["values"]
) -> None:
    """Declare that state ``key`` of the optimizer class named ``optimizer`` starts at
    ``value(param_group)``, not at 0.

    "values" declares a copy of the values, such as Lookahead's slow weights: for a new connection
    it starts at the connection's value. This is for optimizers from other packages: those of
    `torch.optim` are known. So are copies whose name tells (slow, master, old_p, ..._param,
    ..._weight), or that equal the values when the optimizer begins to follow.
    """
    _INITIAL[optimizer, key] = value
    _DECLARED.clear()


#: A cache of `_declared`.
_DECLARED: dict[tuple[type[Optimizer], str], Any] = {}


def _declared(
    kind: type[Optimizer], key: str
) -> Callable[[dict[str, Any]], float] | Literal["values"] | None:
    """What is declared of state ``key`` of a class of optimizers or one of its base classes."""
    if (kind, key) not in _DECLARED:
        found = (_INITIAL.get((c.__name__, key)) for c in kind.__mro__)
        rule = next((rule for rule in found if rule is not None), None)
        _DECLARED[kind, key] = "values" if rule is None and _COPY.search(key) else rule
    known: Callable[[dict[str, Any]], float] | Literal["values"] | None = _DECLARED[kind, key]
    return known


def _known_name(optimizer: Optimizer, table: Iterable[str]) -> str | None:
    names = set(table)
    return next((c.__name__ for c in type(optimizer).__mro__ if c.__name__ in names), None)


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise ValueError, which says why, if the optimizer or one inside it cannot train a sparse
    weight.
    """
    for member in inner_optimizers(optimizer):
        name = _known_name(member, _REFUSED)
        if name:
            inside = "" if member is optimizer else f" ({type(optimizer).__name__} has it inside)"
            raise ValueError(
                f"{name} cannot train sparse weights{inside}: {_REFUSED[name]}; use it for the "
                "dense parameters and another optimizer, such as SGD or Adam, for the sparse ones"
            )


def _kept(optimizer: Optimizer, parameter: Tensor, *, resized: bool = False) -> Iterator[Kept]:
    """All tensors that an optimizer itself, not one inside it, keeps for a parameter.

    Tensors that share the parameter's storage are left out: SAM makes a tensor that it kept the
    parameter's data.
    """
    state = optimizer.state.get(parameter)
    if state:
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and not shares_storage(value, parameter):
                yield Kept(state, key, value, str(key), parameter)
    if not is_plain(optimizer):
        for kept in kept_beside(optimizer, parameter if resized else None):
            if kept.parameter is parameter and not shares_storage(kept.tensor, parameter):
                yield kept


def _start(optimizer: Optimizer, kept: Kept) -> float | None:
    """The initial value for a new connection; None for the connection's own value."""
    if _declared(type(optimizer), kept.name) is None:
        return initial_of(optimizer, kept.name, {})
    group = next(
        (g for g in optimizer.param_groups if any(p is kept.parameter for p in g["params"])), {}
    )
    return initial_of(optimizer, kept.name, group)


def initial_of(optimizer: Optimizer, key: str, group: dict[str, Any]) -> float | None:
    """The initial value of state ``key`` for a new connection; None for the connection's own
    value.
    """
    rule = _declared(type(optimizer), key)
    if rule is None:
        return None if key in _COPIES.get(optimizer, ()) else 0.0
    return None if rule == "values" else rule(group)


def following(weight: SparseWeight) -> list[Optimizer]:
    """The optimizers that follow a weight and are alive."""
    found = (f.optimizer for f in weight.followers if isinstance(f, OptimizerFollower))
    return [optimizer for optimizer in found if optimizer is not None]


def _per_slot(
    optimizer: Optimizer, parameter: Tensor, length: int
) -> Iterator[tuple[Kept, float | None]]:
    """The tensors with one number per slot, with the initial value for a new connection."""
    for kept in _kept(optimizer, parameter, resized=length != parameter.numel()):
        # This also holds for a single slot: a step counter is 0-dim in torch.optim, not 1-D.
        if kept.tensor.dim() == 1 and kept.tensor.numel() == length:
            yield kept, _start(optimizer, kept)


def reset_optimizer_state(optimizer: Optimizer, parameter: Tensor, slots: Tensor) -> None:
    """Set the optimizer's state of ``slots`` to its initial value, which is not always 0."""
    for kept, initial in _per_slot(optimizer, parameter, parameter.numel()):
        if initial is not None:
            kept.tensor.index_fill_(0, slots, initial)
        else:
            kept.tensor.index_copy_(0, slots, parameter.detach()[slots].to(kept.tensor))


def restart_optimizer_state(optimizer: Optimizer, parameter: Tensor) -> None:
    """Set all state of a parameter, counters as well, to what it was before the first step."""
    for member in inner_optimizers(optimizer):
        if is_plain(member):
            state = member.state.get(parameter, {})
            # A wrapper's copies of the values lie in the state of the optimizer inside it.
            copies = {k: v for k, v in state.items() if _COPY.search(str(k))}
            if not copies:
                member.state.pop(parameter, None)
                continue
        # Others may make their state at construction only, so it must stay.
        for kept in list(_kept(member, parameter)):
            initial = _start(member, kept) if kept.tensor.shape == parameter.shape else 0.0
            if initial is None:
                kept.tensor.copy_(parameter.detach())
            else:
                kept.tensor.fill_(initial)
        for key, value in member.state.get(parameter, {}).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and key in ("step", "steps", "t"):
                member.state[parameter][key] = type(value)(0)


def carry_optimizer_state(optimizer: Optimizer, parameter: Tensor, source: Tensor) -> None:
    """Move state as the slots moved: slot k takes what slot ``source[k]`` had; -1 starts afresh.

    State that has the new length already counts as moved. Includes optimizers inside this one.
    """
    for member in inner_optimizers(optimizer):
        _carry(member, parameter, source)


def _carry(optimizer: Optimizer, parameter: Tensor, source: Tensor) -> None:
    least = None  # the old length is unknown, but it was at least this
    for kept in list(_kept(optimizer, parameter, resized=True)):
        length = kept.tensor.numel()
        if kept.tensor.dim() != 1 or length == source.numel():
            continue
        least = int(source.max()) + 1 if least is None else least
        if length >= least:
            kept.put(gathered(kept.tensor, source, _start(optimizer, kept) or 0.0))


def gathered(value: Tensor, source: Tensor, initial: float, *, full: bool = False) -> Tensor:
    """``value[source[k]]`` for each k, and ``initial`` where source[k] (int64) is -1.

    ``full``: no entry of source is -1.
    """
    if full:
        return value.detach().index_select(0, source)
    if not value.numel():
        return value.new_full((source.numel(),), initial)
    return value.detach().index_select(0, source.clamp(min=0)).masked_fill_(source < 0, initial)


#: The last event handled for each optimizer: if a user and a method both made it follow, its state
#: must move only once.
_DONE: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Event]] = weakref.WeakKeyDictionary()

#: Optimizers that `_warn_of_bias` has warned of.
_WARNED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class OptimizerFollower:
    """Keeps the state of one optimizer, and of those inside it, in line with the weights followed.

    Holds the optimizer weakly. ``moments``: see `follow_optimizer`.
    """

    def __init__(self, optimizer: Optimizer, moments: Moments = "auto") -> None:
        check_optimizer(optimizer)
        if moments not in ("auto", "aged", "cleared"):
            raise ValueError(f"moments must be 'auto', 'aged' or 'cleared', not {moments!r}")
        self._optimizer = weakref.ref(optimizer)
        self._moments = moments

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, if it is alive."""
        return self._optimizer()

    def __call__(self, event: Event) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if is_plain(optimizer):
            # Plain SGD has no state, and before the first step there is none.
            if optimizer.state.get(event.weight.stored_values()):
                self._follow(optimizer, optimizer, event)
            return
        # Looked for each time, because some wrappers make their optimizers in the first step.
        for member in inner_optimizers(optimizer):
            self._follow(optimizer, member, event)

    def _follow(self, whole: Optimizer, optimizer: Optimizer, event: Event) -> None:
        parameter = event.weight.values
        if not optimizer.state.get(parameter) and is_plain(optimizer):  # plain SGD, or no step yet
            return
        done = _DONE.get(optimizer)
        if done is not None and done() is event:
            return
        _DONE[optimizer] = weakref.ref(event)
        if event.loaded:
            _loaded(optimizer, parameter)
            return
        if event.source is not None:
            for kept, initial in list(_per_slot(optimizer, parameter, event.source.numel())):
                full = event.weight.connections == event.source.numel()
                kept.tensor.copy_(gathered(kept.tensor, event.source, initial or 0.0, full=full))
            _carry(optimizer, parameter, event.source)
        if event.slots.numel():
            reset_optimizer_state(optimizer, parameter, event.slots)
        if self._moments == "cleared":
            return
        if cannot_age(optimizer) is None:
            if start_ages(optimizer, event.weight, event.slots, moved=event.source is not None):
                Ages.watch(optimizer, parameter, id(self))
        elif event.slots.numel():
            _warn_of_bias(whole, optimizer, parameter)

    def watch(self, weight: SparseWeight) -> None:
        """From now on, correct the updates of young connections after every step (`Ages`).

        Raises ValueError for moments="aged" with an optimizer for which that is impossible.
        """
        optimizer = self._optimizer()
        if optimizer is None or self._moments == "cleared":
            return
        for member in movers(optimizer, weight.values):
            why = cannot_age(member)
            if why is None:
                Ages.watch(member, weight.values, id(self))
            elif self._moments == "aged":
                raise ValueError(
                    "moments='aged' is for Adam, AdamW, NAdam, RAdam and Adamax of torch.optim, "
                    f"and {why}: use one of them, or moments='auto' (aged where that can be), or "
                    "'cleared'"
                )

    def leave(self, weight: SparseWeight) -> None:
        """End `watch`."""
        optimizer = self._optimizer()
        if optimizer is not None:
            for member in inner_optimizers(optimizer):
                Ages.leave(member, weight.values, id(self))


def _warn_of_bias(whole: Optimizer, optimizer: Optimizer, parameter: Tensor) -> None:
    """Warn, once, that ``optimizer``, inside ``whole``, is like Adam but does not support ages."""
    if optimizer in _WARNED or not looks_biased(optimizer.state.get(parameter, {})):
        return
    if any(one is optimizer for one in movers(whole, parameter)):
        _WARNED.add(optimizer)
        warnings.warn(
            f"{cannot_age(optimizer)}, so connections that grow get the bias correction of the "
            "optimizer's step, not of their own age, and their first updates may be too large: use "
            "Adam, AdamW, NAdam, RAdam or Adamax of torch.optim, or say moments='cleared' to have "
            "it so",
            stacklevel=2,
        )


class _Following(RemovableHandle):
    """A handle that ends all that a follower does for one weight."""

    def __init__(
        self, handle: RemovableHandle, follower: OptimizerFollower, weight: SparseWeight
    ) -> None:
        self.__dict__.update(handle.__dict__)
        self._follower, self._weight = follower, weight

    def remove(self) -> None:
        super().remove()
        self._follower.leave(self._weight)


def _loaded(optimizer: Optimizer, parameter: Tensor) -> None:
    """Drop state of another length, which belongs to the connections before loading.

    State of the right length stays: ``optimizer.load_state_dict`` may have loaded it before.
    """
    state = optimizer.state.get(parameter, {})
    if any(
        isinstance(v, Tensor) and v.dim() == 1 and v.numel() != parameter.numel()
        for v in state.values()
    ):
        del optimizer.state[parameter]
    if not is_plain(optimizer):  # tensors that are in no state_dict
        for kept in list(kept_beside(optimizer, parameter)):
            stale = kept.tensor.dim() == 1 and kept.tensor.numel() != parameter.numel()
            if kept.parameter is parameter and stale:
                initial = _start(optimizer, kept)
                new = parameter.detach().to(kept.tensor, copy=True)
                kept.put(new if initial is None else new.fill_(initial))


@torch.no_grad()
def follow_optimizer(
    optimizer: Optimizer, weights: Iterable[SparseWeight], *, moments: Moments = "auto"
) -> list[RemovableHandle]:
    """Let ``optimizer``, and optimizers inside it, follow every sparse weight that it trains.

    Args:
        moments: the bias correction for a connection that has grown; its state is cleared in any
            case. "aged": that of its own age (docs/adam.md), so it takes the same steps as a
            parameter of an optimizer made when it grew. This is possible with Adam, AdamW, NAdam,
            RAdam and Adamax of `torch.optim`, and takes 2 bytes per slot of optimizer state (4 for
            betas above 0.9997). "cleared": that of the whole parameter, so its first updates are
            too large. "auto": "aged" if the optimizer (of a wrapper, the one inside) is one of
            those, or a subclass with the same ``step``, without ``differentiable=True``; else
            "cleared", with a warning if its state looks like Adam's. The other optimizers of
            `torch.optim` have no bias to correct; Adafactor's decay follows its step.

    Returns the handles, one for each weight, whose ``.remove()`` ends it. Raises ValueError for an
    optimizer that cannot train sparse weights or keeps numbers that could not follow, and for
    "aged" with any other optimizer.
    """
    members = inner_optimizers(optimizer)
    trained = {
        id(p) for member in members for group in member.param_groups for p in group["params"]
    }
    mine = [w for w in weights if id(w.values) in trained]
    follower = OptimizerFollower(optimizer, moments)
    refuse_unknown(optimizer, {f"a weight of shape {tuple(w.shape)}": w.values for w in mine})
    for member in members:
        if not is_plain(member):
            equal = {
                k.name for w in mine for k in _kept(member, w.values) if _equal(k.tensor, w.values)
            }
            _COPIES.setdefault(member, set()).update(equal)
    for w in mine:
        follower.watch(w)
    return [_Following(w.follow(follower), follower, w) for w in mine]


def _equal(kept: Tensor, values: Tensor) -> bool:
    same = kept.shape == values.shape and kept.device == values.device
    return (
        same
        and kept.is_floating_point()
        and bool(values.any())
        and torch.equal(kept.to(values.dtype), values)
    )

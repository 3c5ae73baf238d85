"""Optimizers follow the pools they train: state moves with the connections and starts afresh with
new ones.
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

#: What a per-connection state tensor starts at, where that is not 0: a function of the parameter
#: group, or "values" for a copy of the connection's own value.
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

#: Of each optimizer, the names of what was equal to the values when a follower was made: copies of
#: them, then.
_COPIES: weakref.WeakKeyDictionary[Optimizer, set[str]] = weakref.WeakKeyDictionary()

#: Optimizers whose state or update rule is not one number per connection.
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

    "values" says that it is a copy of the values, such as Lookahead's slow weights: a new
    connection's starts at its own value. For optimizers from other packages; those of `torch.optim`
    are known, and so are copies that were equal to the values when the method was made or whose
    name says it (slow, master, old_p, ..._param, ..._weight).
    """
    _INITIAL[optimizer, key] = value
    _DECLARED.clear()


#: What `_declared` has found.
_DECLARED: dict[tuple[type[Optimizer], str], Any] = {}


def _declared(
    kind: type[Optimizer], key: str
) -> Callable[[dict[str, Any]], float] | Literal["values"] | None:
    """What is declared of state ``key`` of a class of optimizers, or of one above it. Asked for at
    every growth.
    """
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
    """Raise ValueError for an optimizer that cannot train a pool, or has such a one inside, by name
    and why.
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
    """All tensors that an optimizer keeps for a parameter, those of optimizers inside it left out.

    Not what shares its storage: SAM hands a tensor it kept back as the parameter's data.
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
    """What a new connection's number starts at; None for its own value."""
    if _declared(type(optimizer), kept.name) is None:
        return initial_of(optimizer, kept.name, {})
    group = next(
        (g for g in optimizer.param_groups if any(p is kept.parameter for p in g["params"])), {}
    )
    return initial_of(optimizer, kept.name, group)


def initial_of(optimizer: Optimizer, key: str, group: dict[str, Any]) -> float | None:
    """What state ``key`` of a new connection starts at, in a parameter group; None for the
    connection's own value.
    """
    rule = _declared(type(optimizer), key)
    if rule is None:
        return None if key in _COPIES.get(optimizer, ()) else 0.0
    return None if rule == "values" else rule(group)


def following(weight: SparseWeight) -> list[Optimizer]:
    """The optimizers that follow a pool and are alive."""
    mine = [f for f in weight.followers if isinstance(f, OptimizerFollower)]
    return [optimizer for f in mine if (optimizer := f._optimizer()) is not None]


def _per_slot(
    optimizer: Optimizer, parameter: Tensor, length: int
) -> Iterator[tuple[Kept, float | None]]:
    """What has one number per slot, with what a new connection's starts at."""
    for kept in _kept(optimizer, parameter, resized=length != parameter.numel()):
        # A pool with one slot: a step counter is 0-dim in torch.optim, so a 1-D tensor is state all
        # the same.
        if kept.tensor.dim() == 1 and kept.tensor.numel() == length:
            yield kept, _start(optimizer, kept)


def reset_optimizer_state(optimizer: Optimizer, parameter: Tensor, slots: Tensor) -> None:
    """Put the optimizer's state of ``slots`` to its initial value, which is not always 0."""
    for kept, initial in _per_slot(optimizer, parameter, parameter.numel()):
        if initial is not None:
            kept.tensor.index_fill_(0, slots, initial)
        else:
            kept.tensor.index_copy_(0, slots, parameter.detach()[slots].to(kept.tensor))


def restart_optimizer_state(optimizer: Optimizer, parameter: Tensor) -> None:
    """Put all state of a parameter, its counters too, to what it was before the first step."""
    for member in inner_optimizers(optimizer):
        if is_plain(member):
            state = member.state.get(parameter, {})
            # a wrapper's, in its inner one's state
            copies = {k: v for k, v in state.items() if _COPY.search(str(k))}
            if not copies:
                member.state.pop(parameter, None)
                continue
        # Some make their state at construction only, and would miss it.
        for kept in list(_kept(member, parameter)):
            initial = _start(member, kept) if kept.tensor.shape == parameter.shape else 0.0
            if initial is None:
                kept.tensor.copy_(parameter.detach())
            else:
                kept.tensor.fill_(initial)
        for key, value in member.state.get(parameter, {}).items():
            if (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and key in ("step", "steps", "t")
            ):
                member.state[parameter][key] = type(value)(0)


def carry_optimizer_state(optimizer: Optimizer, parameter: Tensor, source: Tensor) -> None:
    """Move per-slot state as the pool moved: slot k takes what slot ``source[k]`` had, -1 starts
    afresh.

    State whose length is already the pool's new one is taken to have been carried before.
    Optimizers inside another are carried along.
    """
    for member in inner_optimizers(optimizer):
        _carry(member, parameter, source)


def _carry(optimizer: Optimizer, parameter: Tensor, source: Tensor) -> None:
    least = None  # the old length is not known, but it was at least this
    for kept in list(_kept(optimizer, parameter, resized=True)):
        length = kept.tensor.numel()
        if kept.tensor.dim() != 1 or length == source.numel():
            continue
        least = int(source.max()) + 1 if least is None else least
        if length >= least:
            kept.put(gathered(kept.tensor, source, _start(optimizer, kept) or 0.0))


def gathered(value: Tensor, source: Tensor, initial: float, *, full: bool = False) -> Tensor:
    """Number k is what ``value`` has at ``source[k]`` (int64); ``initial`` where that is -1
    (nowhere, if ``full``).
    """
    if full:
        return value.detach().index_select(0, source)
    if not value.numel():
        return value.new_full((source.numel(),), initial)
    return value.detach().index_select(0, source.clamp(min=0)).masked_fill_(source < 0, initial)


#: The last event that reached each optimizer: where two of us follow for one (a user and a method),
#: the second one must not move its state again.
_DONE: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Event]] = weakref.WeakKeyDictionary()


#: Optimizers whose users know that grown connections start with the bias correction of an old
#: parameter.
_WARNED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class OptimizerFollower:
    """Keeps one optimizer, and all inside it, in step with the pools it follows. Holds the
    optimizer weakly.

    ``moments``: see `follow_optimizer`.
    """

    def __init__(self, optimizer: Optimizer, moments: Moments = "auto") -> None:
        check_optimizer(optimizer)
        if moments not in ("auto", "aged", "cleared"):
            raise ValueError(f"moments must be 'auto', 'aged' or 'cleared', not {moments!r}")
        self._optimizer = weakref.ref(optimizer)
        self._moments = moments

    def __call__(self, event: Event) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if is_plain(optimizer):
            # not plain SGD, nor before the first step
            if optimizer.state.get(event.weight.stored_values()):
                self._follow(optimizer, optimizer, event)
            return
        # looked for anew: some are made in the first step
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
        """See to the ages that there are in the state of this pool, or will be loaded, at every
        step from now on.

        Raises ValueError if that must be and cannot.
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
    """Once: that ``optimizer``, inside ``whole``, is like Adam, but not one that grown connections
    can be young in.
    """
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
    """Ends what a follower does for one pool: it is told of changes no longer, and no longer sees
    to ages.
    """

    def __init__(
        self, handle: RemovableHandle, follower: OptimizerFollower, weight: SparseWeight
    ) -> None:
        self.__dict__.update(handle.__dict__)
        self._follower, self._weight = follower, weight

    def remove(self) -> None:
        super().remove()
        self._follower.leave(self._weight)


def _loaded(optimizer: Optimizer, parameter: Tensor) -> None:
    """Loading leaves optimizer state to optimizer.load_state_dict, before or after; state of
    another length belongs to the pool that was there before, and is created anew.
    """
    state = optimizer.state.get(parameter, {})
    if any(
        isinstance(v, Tensor) and v.dim() == 1 and v.numel() != parameter.numel()
        for v in state.values()
    ):
        del optimizer.state[parameter]
    if not is_plain(optimizer):  # what no state_dict has
        for kept in list(kept_beside(optimizer, parameter)):
            if (
                kept.parameter is parameter
                and kept.tensor.dim() == 1
                and kept.tensor.numel() != parameter.numel()
            ):
                initial = _start(optimizer, kept)
                new = parameter.detach().to(kept.tensor, copy=True)
                kept.put(new if initial is None else new.fill_(initial))


@torch.no_grad()
def follow_optimizer(
    optimizer: Optimizer, weights: Iterable[SparseWeight], *, moments: Moments = "auto"
) -> list[RemovableHandle]:
    """Let ``optimizer``, and all inside it, follow every pool that it trains; returns the handles
    that end it.

    Args:
        moments: what a grown connection starts from; its state is cleared in any case. "aged": it
            then takes the same steps as a parameter whose optimizer was made when it grew, because
            Adam, AdamW, NAdam, RAdam and Adamax of `torch.optim` correct its bias for its own age
            (docs/adam.md). That is 2 bytes a slot of optimizer state, 4 for betas above 0.9997.
            "cleared": its bias correction is that of the whole parameter, so its first updates are
            too large. "auto": aged where the optimizer (of a wrapper, the one inside) is one of
            those or a subclass that keeps its ``step``, without ``differentiable=True``; else
            cleared, with a warning if its state looks like Adam's. `torch.optim`'s others have no
            bias to correct; Adafactor's decay follows its step.

    Raises ValueError for an optimizer that cannot train pools, or keeps numbers that could not
    follow, and for "aged" with one that is none of those.
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

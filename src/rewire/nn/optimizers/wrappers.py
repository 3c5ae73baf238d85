"""Optimizers with other optimizers inside, and what an optimizer keeps outside its ``state``.

A wrapper (Lookahead, SAM, `torch.distributed.optim.ZeroRedundancyOptimizer`, an optimizer made of
several) is one optimizer for its user. For a sparse weight it is several: each may keep state for
the weight's values, and the innermost one that has the values moves them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "Kept",
    "inner_optimizers",
    "is_plain",
    "kept_beside",
    "listed",
    "movers",
    "refuse_unknown",
    "shares_storage",
    "trainers",
]

#: Attributes of every optimizer, which `kept_beside` does not search.
_OWN = frozenset({"state", "param_groups", "defaults"})
#: A list with more entries holds data, not state of parameters or optimizers.
_LONGEST = 100_000


def listed(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """One optimizer or several, as a list.

    Raises TypeError for anything but a `torch.optim.Optimizer`, ValueError for one that has no
    parameters itself.
    """
    given: Any = optimizers
    one = isinstance(given, Optimizer) or not isinstance(given, Iterable)
    several = [given] if one else list(given)
    for each in several:
        if not isinstance(each, Optimizer):
            raise TypeError(
                f"an optimizer must be a torch.optim.Optimizer, not a {type(each).__name__}: "
                "give the optimizer that it wraps, or several of them as a list"
            )
        if not getattr(each, "param_groups", None):
            raise ValueError(
                f"{type(each).__name__} has no parameter groups of its own: give the optimizers "
                "inside it, as a list"
            )
    return several


def is_plain(optimizer: Optimizer) -> bool:
    """Whether it is from `torch.optim`: no optimizer inside, and all its state in ``state``."""
    return type(optimizer).__module__.startswith("torch.optim.")


def inner_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer and all optimizers inside it, at any depth, each once; outer ones first.

    They are looked for in attributes: an optimizer, a list or dict of them, or an object that has
    one for the same parameters.
    """
    found = [optimizer]
    if is_plain(optimizer):
        return found
    ids = {id(optimizer)}
    for outer in found:
        for inner in () if is_plain(outer) else _held(outer):
            if id(inner) not in ids:
                ids.add(id(inner))
                found.append(inner)
    return found


def _held(outer: Optimizer) -> Iterator[Optimizer]:
    known = _parameters(outer)
    for name, value in vars(outer).items():
        if name in _OWN or name.startswith("_optimizer_"):
            continue
        for item in _flat(value, 3):
            if isinstance(item, Optimizer):
                yield item
            elif not isinstance(item, (Tensor, nn.Module, type, str, bytes)) and not callable(item):
                for inner in getattr(item, "__dict__", {}).values():
                    if isinstance(inner, Optimizer) and known.keys() & _parameters(inner).keys():
                        yield inner


def _flat(value: Any, depth: int) -> Iterator[Any]:
    """The value, or the entries if it is a container."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple, set, deque)):
        yield value
        return
    if depth and len(value) <= _LONGEST:
        for item in value:
            yield from _flat(item, depth - 1)


def _parameters(optimizer: Optimizer) -> dict[int, Tensor]:
    return {id(p): p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def trainers(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers whose steps count: those with parameters that no optimizer inside them has.

    For Lookahead or SAM, the optimizer inside. For ZeroRedundancyOptimizer both: the optimizer
    inside has this rank's share of the parameters, and the outer one brings the others.
    """
    members = inner_optimizers(optimizer)
    if len(members) == 1:
        return members
    found = []
    for member in members:
        deeper = {key for inner in inner_optimizers(member)[1:] for key in _parameters(inner)}
        if not _parameters(member).keys() <= deeper:
            found.append(member)
    return found


def movers(optimizer: Optimizer, parameter: Tensor | None) -> list[Optimizer]:
    """The members of `trainers` whose steps move ``parameter``: normally one; no one if the
    optimizer does not have it.
    """
    key = id(parameter)
    return [
        one
        for one in trainers(optimizer)
        if key in _parameters(one)
        and not any(key in _parameters(inner) for inner in inner_optimizers(one)[1:])
    ]


class Kept(NamedTuple):
    """A tensor that an optimizer keeps, at ``holder[key]``; its name, and the parameter that it
    belongs to, if that is known.
    """

    holder: Any
    key: Any
    tensor: Tensor
    name: str
    parameter: Tensor | None

    def put(self, tensor: Tensor) -> None:
        """Put ``tensor``, of any length, in its place."""
        if isinstance(self.holder, tuple):
            self.tensor.data = tensor
        else:
            self.holder[self.key] = tensor


def kept_beside(optimizer: Optimizer, resized: Tensor | None = None) -> Iterator[Kept]:
    """The tensors that an optimizer keeps anywhere but directly in ``state[parameter]``.

    The place of a tensor tells its parameter: a dict by parameter (or its id); a list or tuple with
    an entry of the right shape for each parameter (of all groups, of those trained, or one list per
    group); or deeper in ``state[parameter]``. The parameter ``resized`` has another length already
    than its tensors. Optimizers of PyTorch itself keep nothing in other places.
    """
    if type(optimizer).__module__.startswith("torch."):
        return
    yield from _Beside(optimizer, resized).all()


class _Beside:
    """The search of `kept_beside`."""

    def __init__(self, optimizer: Optimizer, resized: Tensor | None) -> None:
        self.optimizer, self.resized = optimizer, resized
        self.groups: list[list[Tensor]] = [
            list(group["params"]) for group in optimizer.param_groups
        ]
        self.all_parameters = [p for group in self.groups for p in group]
        self.known = {id(p): p for p in self.all_parameters}
        self.trained = [p for p in self.all_parameters if p.requires_grad]
        # What the optimizers inside keep is found when they are searched.
        self.visited = {
            id(x)
            for member in inner_optimizers(optimizer)
            for x in (member.state, member.param_groups)
        }
        self.visited |= {id(p) for p in self.all_parameters}

    def all(self) -> Iterator[Kept]:
        attributes = vars(self.optimizer)
        for name in list(attributes):
            if name not in _OWN and not name.startswith("_optimizer_"):
                yield from self.visit(attributes, name, name, None)
        for group, params in zip(self.optimizer.param_groups, self.groups, strict=True):
            for key in list(group):
                if key != "params":
                    yield from self.visit(group, key, f"param_groups[...][{key!r}]", None, params)
        state: dict[Any, Any] = self.optimizer.state
        for owner in list(state):
            if not isinstance(owner, Tensor):
                yield from self.visit(state, owner, f"state[{owner!r}]", None)
            elif isinstance(state[owner], dict):
                for deeper, value in list(state[owner].items()):
                    if not isinstance(value, Tensor):
                        yield from self.visit(state[owner], deeper, str(deeper), owner)

    def visit(
        self,
        holder: Any,
        key: Any,
        name: str,
        parameter: Tensor | None,
        own: list[Tensor] | None = None,
    ) -> Iterator[Kept]:
        value = holder[key]
        if isinstance(value, Tensor):
            if id(value) not in self.visited:
                self.visited.add(id(value))
                yield Kept(holder, key, value, name, parameter)
            return
        container = isinstance(value, (dict, list, tuple, deque)) and len(value) <= _LONGEST
        if not container or id(value) in self.visited:
            return
        self.visited.add(id(value))
        if isinstance(value, dict):
            for k in list(value):
                found = parameter
                if found is None:
                    found = self.known.get(id(k) if isinstance(k, Tensor) else k)
                deeper = name if found is not None else f"{name}[{k!r}]"
                yield from self.visit(value, k, deeper, found)
            return
        places: list[Tensor | None] = [parameter] * len(value)
        lists: list[list[Tensor] | None] = [None] * len(value)
        if parameter is None:
            candidates = own, self.all_parameters, self.trained
            parallel = next((p for p in candidates if p and self.fit(value, p)), None)
            if parallel is not None:
                places = list(parallel)
            elif len(value) == len(self.groups):
                lists = list(self.groups)
        for i, place in enumerate(places):
            yield from self.visit(value, i, name, place, lists[i])

    def fit(self, values: Sequence[Any], parameters: list[Tensor]) -> bool:
        """Whether there is one entry for each parameter: a tensor of its shape, a dict or None."""
        return len(values) == len(parameters) and all(
            isinstance(v, dict) or v is None or (isinstance(v, Tensor) and self.fits(v, p))
            for v, p in zip(values, parameters, strict=True)
        )

    def fits(self, value: Tensor, parameter: Tensor) -> bool:
        return value.shape == parameter.shape or (parameter is self.resized and value.dim() == 1)


def refuse_unknown(optimizer: Optimizer, values: Mapping[str, Tensor]) -> None:
    """Raise ValueError if an optimizer keeps numbers for each connection that could not follow.

    Those are tensors as long as a pool, or as all parameters together, whose place does not tell
    the parameter; and the tensors of an optimizer inside that trains copies of the parameters.
    ``values``: of the weights that the optimizer trains, by name.
    """
    if is_plain(optimizer) or not values:
        return
    lengths = {v.numel(): name for name, v in values.items() if v.numel() > 1}
    members = inner_optimizers(optimizer)
    own = _parameters(optimizer)
    title = type(optimizer).__name__
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            f"{title} with overlap_with_ddp=True steps within the backward pass, where no method "
            "can follow: leave it False"
        )
    for member in members[1:]:
        for key, parameter in _parameters(member).items():
            if key not in own and parameter.dim() == 1 and parameter.numel() in lengths:
                raise ValueError(
                    f"{title} has an optimizer inside ({type(member).__name__}) that trains a copy "
                    f"of the values of {lengths[parameter.numel()]}, which does not follow its "
                    "connections: use an optimizer that trains the model's own parameters"
                )
    storages = {_storage(p) for p in own.values()}
    for member in members:
        parameters = _parameters(member)
        total = sum(p.numel() for p in parameters.values())
        for kept in kept_beside(member):
            tensor = kept.tensor
            if kept.parameter is not None or tensor.dim() != 1 or not tensor.is_floating_point():
                continue
            if id(tensor) in own or _storage(tensor) in storages:
                continue
            count = tensor.numel()
            if count in lengths or (count == total and len(parameters) > 1):
                one = f"the values of {lengths.get(count)}"
                whose = one if count in lengths else "all parameters together"
                raise ValueError(
                    f"{type(member).__name__} keeps {count} numbers in {kept.name}, as many as "
                    f"{whose}, and does not say for which parameter: where connections change they "
                    "could not follow. Keep them in optimizer.state[parameter], or in a list with "
                    "one tensor for each parameter"
                )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else id(tensor)


def shares_storage(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same memory (SAM makes a tensor that it kept the parameter's data)."""
    return one.data_ptr() == other.data_ptr() and one.numel() > 0 and one.device.type != "meta"

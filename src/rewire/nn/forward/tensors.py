"""The tensors among the inputs and outputs of modules, in arguments, tuples, dicts, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

__all__ = ["first_input", "first_tensor", "head", "map_tensors", "rows", "tensors_in"]


def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a layer, positional or by name, from the arguments of a forward hook.

    The hook is registered with ``with_kwargs=True``. Raises ValueError without any argument.
    """
    if args:
        return args[0]
    name = next(iter(inspect.signature(module.forward).parameters), None)
    if name is not None and name in kwargs:
        return kwargs[name]
    if kwargs:  # forward(**kwargs), or a first argument that has a default
        return next(iter(kwargs.values()))
    raise ValueError(f"a {type(module).__name__} was called without any input")


def _parts(x: Any) -> Iterable[Any] | None:
    """The entries of a container, in order; None for anything else."""
    if isinstance(x, PackedSequence):
        return (x.data,)
    if isinstance(x, Mapping):
        return list(x.values())
    if isinstance(x, tuple | list):
        return list(x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [getattr(x, field.name, None) for field in dataclasses.fields(x)]  # slots too
    if isinstance(x, nn.Module | type) or callable(x) or not hasattr(x, "__dict__"):
        return None
    return list(vars(x).values())


def tensors_in(x: Any) -> list[Tensor]:
    """The tensors within tuples, lists, dicts, dataclasses, packed sequences and plain objects, in
    order.

    For a packed sequence that is its data. Objects that refer to themselves are visited once.
    """
    found: list[Tensor] = []
    stack, seen = [x], set()
    while stack:
        here = stack.pop()
        if isinstance(here, Tensor):
            found.append(here)
        elif id(here) not in seen and (parts := _parts(here)) is not None:
            seen.add(id(here))
            stack += reversed(list(parts))
    return found


def first_tensor(x: Any) -> Tensor | None:
    """The first of `tensors_in`, which is the output itself of a layer; None without tensors."""
    found = tensors_in(x)
    return found[0] if found else None


def map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """``x`` with every tensor in tuples, lists, dicts, dataclasses, packed sequences replaced by
    ``function`` of it.
    """
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, PackedSequence):
        return PackedSequence(function(x.data), x.batch_sizes, x.sorted_indices, x.unsorted_indices)
    if isinstance(x, tuple | list):
        parts = [map_tensors(function, part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    if isinstance(x, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in x.items()}
        return mapped if type(x) is dict else _like(x, mapped)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        twin = copy.copy(x)
        for field in dataclasses.fields(x):
            object.__setattr__(twin, field.name, map_tensors(function, getattr(x, field.name)))
        return twin
    return x


def _like(x: Mapping[Any, Any], mapped: dict[Any, Any]) -> Any:
    try:
        return type(x)(mapped)  # type: ignore[call-arg]
    except TypeError:
        return mapped


def rows(x: Any) -> int:
    """The number of samples in a batch: the length of its first tensor, or the packed sequences."""
    if isinstance(x, PackedSequence):
        return int(x.batch_sizes[0])
    if isinstance(x, tuple | list) and x and isinstance(x[0], PackedSequence):
        return rows(x[0])
    first = first_tensor(x)
    return 0 if first is None or first.dim() == 0 else first.shape[0]


def head(x: Any, count: int) -> Any:
    """The first ``count`` samples of a batch, as detached copies.

    Tensors that are not as long as the first, and packed sequences, stay whole.
    """
    length = rows(x)

    def cut(tensor: Tensor) -> Tensor:
        part = tensor[:count] if tensor.dim() and tensor.shape[0] == length else tensor
        return part.detach().clone()

    packed = isinstance(x, PackedSequence) or (
        isinstance(x, tuple | list) and any(isinstance(p, PackedSequence) for p in x)
    )
    return map_tensors(torch.clone if packed else cut, x)

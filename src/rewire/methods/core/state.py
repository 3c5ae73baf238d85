"""What a method declares to be saved, and how it is copied out and in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

__all__ = ["copied", "restore", "restored", "saved"]


def copied(value: Any) -> Any:
    """``value`` with all tensors in it cloned; lists and dicts are new."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [copied(part) for part in value]
    return value


def restored(given: Any, mine: Any, device: Callable[[int | str], torch.device]) -> Any:
    """``given``, a result of `copied`, as an attribute that holds ``mine`` now.

    Tensors are copied to the device of the one they replace, or else to ``device(key)`` of the key
    or place they stand at; numbers get the type of those they replace. Raises TypeError if the two
    are of different kinds.
    """
    if isinstance(given, Tensor):
        return given.to(mine.device if isinstance(mine, Tensor) else device(0), copy=True)
    if isinstance(given, Mapping):
        have = mine if isinstance(mine, Mapping) else {}
        return {key: _part(key, part, have.get(key), device) for key, part in given.items()}
    if isinstance(given, list):
        old = (
            mine if isinstance(mine, Sequence) and len(mine) == len(given) else [None] * len(given)
        )
        return [
            _part(i, part, now, device)
            for i, (part, now) in enumerate(zip(given, old, strict=True))
        ]
    if mine is None or given is None or isinstance(mine, str):
        return given
    if isinstance(mine, bool | int | float):
        return type(mine)(given)
    raise TypeError(f"{type(given).__name__} where {type(mine).__name__} is expected")


def _part(
    key: int | str, given: Any, mine: Any, device: Callable[[int | str], torch.device]
) -> Any:
    if isinstance(given, Tensor) and not isinstance(mine, Tensor):
        return given.to(device(key), copy=True)
    return restored(given, mine, device)


def saved(owner: object, paths: Sequence[str]) -> dict[str, Any]:
    """Copies of the attributes at ``paths`` ("done", "grow.averages"), by their last name."""
    return {_key(path): copied(attrgetter(path)(owner)) for path in paths}


def restore(
    owner: object,
    paths: Sequence[str],
    state: Mapping[str, Any],
    device: Callable[[int | str], torch.device],
) -> None:
    """Set the attributes at ``paths`` to what `saved` gave; all of it is read before anything is
    changed. ``device``: see `restored`. Raises KeyError or TypeError.
    """
    values = [restored(state[_key(path)], attrgetter(path)(owner), device) for path in paths]
    for path, value in zip(paths, values, strict=True):
        parent, _, name = path.rpartition(".")
        setattr(attrgetter(parent)(owner) if parent else owner, name, value)


def _key(path: str) -> str:
    return path.rpartition(".")[2].lstrip("_")

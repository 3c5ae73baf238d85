"""Nested states as tensors and JSON: what safetensors files hold of dicts, lists and numbers."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from rewire.storage import tensors as tensor_file
from rewire.storage.reading import FileError

__all__ = ["flatten", "pack", "unflatten", "unpack"]


def flatten(value: Any, tensors: dict[str, Tensor], path: str = "state") -> Any:
    """Put every tensor of `value` into `tensors`, a reference in its place, and return what JSON
    can hold.

    Dicts with keys that are no strings (optimizer state) and tuples come back as they were.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach()  # no copy: it is written before anything can change it
        return {"$tensor": path}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: flatten(item, tensors, f"{path}.{key}") for key, item in value.items()}
        return {
            "$dict": [[key, flatten(item, tensors, f"{path}.{key}")] for key, item in value.items()]
        }
    if isinstance(value, list | tuple):
        items = [flatten(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} cannot be saved")


def unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        if "$dict" in value:
            return {key: unflatten(item, tensors) for key, item in value["$dict"]}
        if "$tuple" in value:
            return tuple(unflatten(item, tensors) for item in value["$tuple"])
        return {key: unflatten(item, tensors) for key, item in value.items()}
    return value


def pack(value: Any) -> bytes:
    """A nested state as the content of a safetensors file."""
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(flatten(value, tensors))  # which fills tensors
    return tensor_file.pack(tensors, {"state": skeleton})


def unpack(content: bytes, where: str) -> Any:
    """The state that `pack` was given. Raises FileError; ``where``: for messages."""
    tensors, metadata = tensor_file.parse(content, where)
    try:
        return unflatten(json.loads(metadata["state"]), tensors)
    except (KeyError, ValueError) as error:
        raise FileError(f"{where} is damaged: {error!r}") from None

"""Files of adapters: differences, trained parameters, and what base they belong to; O(K) bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rewire.nn.finetune.base import Identity
from rewire.nn.layers.adapted import DIFFERENCE
from rewire.storage import reading
from rewire.storage import tensors as tensor_file
from rewire.storage.reading import FileError

__all__ = ["Saved", "read", "write"]

_KEY = "rewire.adapter"
_WEIGHT = f"{DIFFERENCE}.weight"


class Saved(NamedTuple):
    """What a file holds.

    differences: by the name of the layer, the ``state_dict`` of its sparse weight.
    parameters, buffers: tensors of the base that training has changed.
    base: what was known of the base before, by name.
    """

    differences: dict[str, dict[str, Tensor]]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    base: dict[str, Identity]


def write(path: Path, saved: Saved) -> None:
    """Write a file, atomically. Raises OSError."""
    tensors = dict(saved.parameters) | saved.buffers
    for layer, state in saved.differences.items():
        prefix = f"{layer}.{_WEIGHT}" if layer else _WEIGHT
        tensors |= {f"{prefix}.{part}": tensor.detach() for part, tensor in state.items()}
    about = {"parameters": [*saved.parameters], "buffers": [*saved.buffers], "base": saved.base}
    metadata = {_KEY: json.dumps(about)}
    metadata["sha256"] = tensor_file.content_sha256(tensors, metadata)
    tensor_file.write(path, tensors, metadata)


def read(path: Path) -> Saved:
    """What `write` wrote; the topologies are not checked yet.

    Raises OSError or FileError. Memory: twice the file's size.
    """
    tensors, metadata = tensor_file.read(path)
    if _KEY not in metadata:
        raise FileError(f"{path} is no adapter: `Adapter.save` writes such files")
    tensor_file.check_sum(tensors, metadata, str(path))
    about = reading.parse_json(metadata[_KEY].encode(), str(path))
    try:
        parameters, buffers = (_taken(tensors, about[k]) for k in ("parameters", "buffers"))
        base = _base(about["base"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileError(f"{path} is damaged: {reading.brief(repr(error))}") from None
    differences: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        layer, found, part = key.rpartition(f"{_WEIGHT}.")
        if not found or (layer and not layer.endswith(".")):
            raise FileError(f"{path} is damaged: it does not say what {reading.brief(key)} is")
        differences.setdefault(layer.removesuffix("."), {})[part] = tensor
    return Saved(differences, parameters, buffers, base)


def _taken(tensors: dict[str, Tensor], names: Any) -> dict[str, Tensor]:
    """Take the tensors of these names out."""
    if not isinstance(names, list):
        raise TypeError(f"a list of names is needed, not {names!r}")
    return {name: tensors.pop(name) for name in names}


def _base(about: Mapping[str, Any]) -> dict[str, Identity]:
    found = {}
    for name, (dtype, shape, digest) in about.items():
        numbers = tuple(shape)
        whole = all(type(n) is int for n in numbers)
        if not (isinstance(dtype, str) and isinstance(digest, str) and whole):
            raise TypeError(f"{name} is described by {dtype!r}, {shape!r}, {digest!r}")
        found[name] = dtype, numbers, digest
    return found

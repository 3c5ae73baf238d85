"""The entries of a sparse weight in a ``state_dict``, checked before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor

from rewire import topology
from rewire.budget import Limits
from rewire.topology import Index, Prior, TopologyError
from rewire.topology import limits as limited

__all__ = ["Keys", "Saved", "keys", "note", "read"]

_POOL = ("values", "rows", "cols")
_FACTS = ("shape", "limits", "allowed", "frozen")
#: The most frequent reason for an invalid topology.
_AVERAGE = (
    " (an average of state_dicts would be like that: it mixes connections; average with rewire.ema)"
)


class Keys(NamedTuple):
    """The short names of the entries found, and the keys that are missing or unexpected."""

    found: list[str]
    missing: list[str]
    unexpected: list[str]


class Saved(NamedTuple):
    """A valid saved pool: int64 positions on the weight's device, and the index made of them."""

    values: Tensor
    rows: Tensor
    cols: Tensor
    lists: Index
    limits: Limits | None
    prior: Prior | None


def note(
    destination: MutableMapping[str, Tensor],
    prefix: str,
    shape: torch.Size,
    limits: Limits | None,
    prior: Prior | None,
) -> None:
    """Add shape, limits and prior, so that the entries cannot be loaded into another weight."""
    destination[prefix + "shape"] = torch.tensor(shape, dtype=torch.int64)
    if limits is not None:
        destination[prefix + "limits"] = torch.tensor(limits.as_numbers(), dtype=torch.int64)
    if prior is not None and prior.allowed is not None:
        destination[prefix + "allowed"] = prior.allowed.keys
    if prior is not None and prior.frozen is not None:
        destination[prefix + "frozen"] = prior.frozen


def keys(state_dict: Mapping[str, Tensor], prefix: str, strict: bool) -> Keys:
    """Look for the entries below ``prefix``.

    If only some are there, none counts as missing here, because `read` raises for them.
    """
    found = [name for name in _POOL if prefix + name in state_dict]
    known = {prefix + name for name in (*_POOL, *_FACTS)}
    unexpected = (
        [key for key in state_dict if key.startswith(prefix) and key not in known] if strict else []
    )
    return Keys(found, [] if found else [prefix + name for name in _POOL], unexpected)


@torch.no_grad()
def read(
    state_dict: Mapping[str, Tensor],
    prefix: str,
    shape: torch.Size,
    limits: Limits | None,
    prior: Prior | None,
    device: torch.device,
) -> Saved:
    """What is saved below ``prefix``, for a weight of ``shape``.

    ``limits`` and ``prior`` of the weight, if it has any, count instead of those saved. Raises
    `TopologyError` if the entries are incomplete, of another shape, not a valid topology, or do not
    keep limits or prior.
    """
    lacking = [prefix + name for name in _POOL if prefix + name not in state_dict]
    if lacking:
        raise TopologyError(
            f"the topology is incomplete, {', '.join(lacking)} is missing: values, rows and cols "
            "belong together"
        )
    values, rows, cols = (state_dict[prefix + name] for name in _POOL)
    saved_shape, saved_limits, *saved_prior = (state_dict.get(prefix + name) for name in _FACTS)
    # Flattened, because a damaged file may have a 0-dim tensor there.
    if limits is None and saved_limits is not None:
        limits = Limits.from_numbers(saved_limits.flatten().tolist())
    theirs = tuple(shape if saved_shape is None else saved_shape.flatten().tolist())
    if theirs != tuple(shape):
        raise TopologyError(f"saved with shape {theirs}, but this weight is {tuple(shape)}")
    if not values.shape == rows.shape == cols.shape or values.dim() != 1:
        raise TopologyError(
            f"values, rows and cols must be 1-D and equally long, not {tuple(values.shape)}, "
            f"{tuple(rows.shape)} and {tuple(cols.shape)}"
        )
    for name, tensor in zip(_POOL, (values, rows, cols), strict=True):
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            meta = "on the meta device, without numbers"
            kind = meta if tensor.is_meta else f"of layout {tensor.layout}"
            raise TopologyError(f"{prefix}{name} must be an ordinary tensor, not one {kind}")
    whole = not any(t.is_floating_point() or t.is_complex() for t in (rows, cols))
    if not whole or not values.is_floating_point():
        raise TopologyError(f"rows and cols must be integers and values floating-point{_AVERAGE}")
    rows, cols = rows.to(device, torch.int64), cols.to(device, torch.int64)
    size = topology.matrix_size(shape)
    if prior is None:
        prior = Prior.saved(*size, *saved_prior)
        prior = None if prior is None else prior.to(device)
    try:
        index = topology.build_index(rows, cols, *size)
    except TopologyError as error:
        raise TopologyError(f"{error}{_AVERAGE}") from None
    broken = limited.violation(index, *size, limits) if limits is not None else None
    if broken is None and prior is not None:
        broken = prior.violation(index, size[1])
    if broken:
        raise TopologyError(broken)
    return Saved(values, rows, cols, index, limits, prior)

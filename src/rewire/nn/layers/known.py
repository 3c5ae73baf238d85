"""What is known of a layer's topology beforehand: its first connections, and its prior."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rewire import budget
from rewire.nn.layers.edges import Edges, ends_of, frozen_of
from rewire.topology import Prior

__all__ = ["Known", "known"]


class Known(NamedTuple):
    """Arguments of a `rewire.nn.SparseWeight`."""

    connections: int | None
    density: float | None
    start: Tensor | None
    prior: Prior | None


def known(
    n_inputs: int,
    n_outputs: int,
    connections: int | None,
    density: float | None,
    edges: Edges | None,
    allowed: Edges | None,
    frozen: Edges | bool,
) -> Known:
    """The arguments of `rewire.nn.SparseLinear` as keys and a prior.

    Raises ValueError for edges that occur twice or do not fit the layer, and for fewer connections
    than there are edges.
    """
    start = None
    if edges is not None:
        start = ends_of(edges).keys(n_inputs, n_outputs, "edges")
        _refuse_twice(start, n_inputs)
    held = _held(frozen, start, n_inputs, n_outputs)
    parts = [part for part in (start, held) if part is not None]
    start = torch.unique(torch.cat(parts)) if parts else None
    around = None
    if allowed is not None:
        around = ends_of(allowed, "allowed").keys(n_inputs, n_outputs, "allowed")
        around = around if start is None else torch.cat([around, start])
    if start is not None:
        given = connections is not None or density is not None
        if not given:
            connections = start.numel()
        wanted = budget.allowed(n_inputs * n_outputs, connections, density)
        if wanted < start.numel():
            raise ValueError(
                f"the layer may have {wanted} connections, and {start.numel()} edges are given: "
                "allow at least as many, or leave connections= and density= out"
            )
    # Without edges the prior alone says what the first topology must have.
    start = None if edges is None else start
    return Known(connections, density, start, Prior.of(n_outputs, n_inputs, around, held))


def _held(
    frozen: Edges | bool, start: Tensor | None, n_inputs: int, n_outputs: int
) -> Tensor | None:
    """Keys of the frozen connections."""
    frozen = frozen_of(frozen)
    if frozen is False:
        return None
    if not isinstance(frozen, Tensor | bool):
        return frozen.keys(n_inputs, n_outputs, "frozen")
    if start is None:
        raise ValueError("frozen= says which of the edges are frozen: give edges= as well")
    if isinstance(frozen, bool):
        return start
    if frozen.numel() != start.numel():
        raise ValueError(f"frozen has {frozen.numel()} entries for {start.numel()} edges")
    return start[frozen]


def _refuse_twice(keys: Tensor, n_inputs: int) -> None:
    ordered = torch.sort(keys).values
    again = (ordered[1:] == ordered[:-1]).nonzero()
    if again.numel():
        target, source = divmod(int(ordered[again[0]]), n_inputs)
        raise ValueError(
            f"the edge from {source} to {target} occurs more than once in edges: give each once"
        )

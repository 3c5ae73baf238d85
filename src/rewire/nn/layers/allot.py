"""The budget of a layer that has several sparse weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rewire import budget

__all__ = ["Connections", "Density", "allot"]

Connections = int | Sequence[int] | Mapping[str, int]
Density = float | Sequence[float] | Mapping[str, float]


def allot(
    shapes: Mapping[str, tuple[int, ...]],
    connections: Connections | None,
    density: Density | None,
    distribution: str,
) -> dict[str, int]:
    """Connections of each weight of a layer.

    Args:
        shapes: the weights by name, in the layer's order.
        connections, density: exactly one of them. A number is for all weights together and is
            spread by ``distribution`` (see `rewire.budget`); a list (in order) or a dict (by name)
            has one for each weight.

    Raises ValueError for a budget that cannot be met, a list of the wrong length, or names that do
    not match.
    """
    if (connections is None) == (density is None):
        raise ValueError("give exactly one of connections= and density=")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if isinstance(connections, (Sequence, Mapping)):
        counts = _named(shapes, connections)
        for name, count in counts.items():
            if int(count) != count or not 1 <= count <= sizes[name]:
                raise ValueError(
                    f"{name} can have between 1 and {sizes[name]} connections, not {count}"
                )
        return {name: int(count) for name, count in counts.items()}
    if isinstance(density, (Sequence, Mapping)):
        named = _named(shapes, density)
        return {name: budget.connections_of(d, sizes[name]) for name, d in named.items()}
    if density is not None:
        total = budget.connections_of(density, sum(sizes.values()))
    else:
        assert connections is not None
        if int(connections) != connections:
            raise ValueError(f"connections must be a whole number, not {connections}")
        total = int(connections)
    spread = budget.distribute(distribution, list(shapes.values()), total)
    return dict(zip(shapes, spread, strict=True))


def _named(
    shapes: Mapping[str, tuple[int, ...]], given: Sequence[float] | Mapping[str, float]
) -> dict[str, float]:
    if isinstance(given, Mapping):
        if given.keys() != shapes.keys():
            raise ValueError(
                f"the budget names {sorted(given)}, but the weights are {', '.join(shapes)}"
            )
        return {name: given[name] for name in shapes}
    if len(given) != len(shapes):
        raise ValueError(
            f"the budget has {len(given)} entries for {len(shapes)} weights: {', '.join(shapes)}"
        )
    return dict(zip(shapes, given, strict=True))

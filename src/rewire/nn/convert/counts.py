"""How many connections each weight gets when a model is made sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from rewire import budget
from rewire.nn.convert.kinds import join

__all__ = ["Patterns", "chosen", "connection_counts", "kept_by", "matches"]

Patterns = str | Sequence[str]


def matches(name: str, patterns: Patterns, *others: str) -> bool:
    """Whether one of the glob patterns matches the name, or one of the other names."""
    several = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(n, p) for n in (name, *others) for p in several)


def chosen(name: str, only: Patterns | None, exclude: Patterns | None) -> bool:
    """Whether ``only`` (None: everything) includes the name and ``exclude`` (None: nothing) does
    not.
    """
    included = only is None or matches(name, only)
    return included and not (exclude is not None and matches(name, exclude))


def kept_by(mask: Tensor | None, weight: Tensor) -> int:
    """The entries of ``weight`` that a prune mask keeps: all without a mask."""
    return weight.numel() if mask is None else int(mask.sum().item())


def connection_counts(
    weights: Mapping[str, Mapping[str, Tensor]],
    density: float | Mapping[str, float] | None,
    connections: int | Mapping[str, int] | None,
    distribution: str,
    masks: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, dict[str, int]]:
    """Connections of each weight of each layer to convert; ``weights`` has all that could be.

    A weight with a prune mask has the connections of the mask; the other weights that share its
    budget share what is left.
    """
    given = density if density is not None else connections
    every = {
        (layer, name): tensor
        for layer, tensors in weights.items()
        for name, tensor in tensors.items()
    }
    if not every:
        return {}
    counts: dict[tuple[str, str], int] = {}
    for (title, budgeted), members in _groups(given, every).items():
        size = sum(every[key].numel() for key in members)
        share = density is not None
        total = budget.connections_of(budgeted, size) if share else _within(title, budgeted, size)
        own = {key: masks[key[0]].get(key[1]) for key in members}
        pruned = {key: kept_by(m, every[key]) for key, m in own.items() if m is not None}
        members = [key for key in members if key not in pruned]
        total -= sum(pruned.values())
        # Pruning to a share rounds for each weight, a density only once.
        slack = len(pruned) if share else 0
        if pruned and (total < len(members) if members else abs(total) > slack):
            kept, names = sum(pruned.values()), ", ".join(join(*key) for key in pruned)
            raise ValueError(
                f"the prune masks of {names} keep {kept} connections, which does not agree with "
                f"{kept + total}, what {title} may "
                f"have{' together with other weights' if members else ''}: leave density= and "
                "connections= out to take the masks as they are, or call "
                "torch.nn.utils.prune.remove(layer, name) to choose anew"
            )
        counts |= pruned
        shapes = [tuple(every[key].shape) for key in members]
        if members:
            counts |= zip(members, budget.distribute(distribution, shapes, total), strict=True)
    sparse = {layer for layer, _ in counts}
    for layer, name in every:
        if layer in sparse and (layer, name) not in counts:
            raise ValueError(
                f"a layer is sparse as a whole, but no pattern matches {join(layer, name)}"
            )
    return {
        layer: {name: counts[layer, name] for name in weights[layer]}
        for layer in weights
        if layer in sparse
    }


def _groups(
    given: Any, every: Mapping[tuple[str, str], Tensor]
) -> dict[tuple[str, Any], list[tuple[str, str]]]:
    """The weights that share a budget: (their title, their budget) -> (layer, weight) of each."""
    if not isinstance(given, Mapping):
        return {("the model", given): list(every)}
    names = {key: (key[0], join(*key)) for key in every}
    for pattern in given:
        if not any(matches(both[0], pattern, both[1]) for both in names.values()):
            raise ValueError(
                f"pattern {pattern!r} matches no layer; there are "
                f"{', '.join(dict.fromkeys(k[0] for k in every))}"
            )
    groups: dict[tuple[str, Any], list[tuple[str, str]]] = {}
    for key, both in names.items():
        pattern = next((p for p in given if matches(both[0], p, both[1])), None)
        if pattern is not None:
            title = both[0] if fnmatchcase(both[0], pattern) else both[1]
            groups.setdefault((title, given[pattern]), []).append(key)
    return groups


def _within(name: str, connections: float | None, size: int) -> int:
    if connections is None or not 1 <= connections <= size or int(connections) != connections:
        raise ValueError(f"{name} can have between 1 and {size} connections, not {connections}")
    return int(connections)

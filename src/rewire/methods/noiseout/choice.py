"""What NoiseOut looks at: the layers whose units it merges, and the inputs it measures them
over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch.nn.utils.rnn import PackedSequence

from rewire.methods.core.base import Data
from rewire.methods.core.parameters import Patterns
from rewire.methods.noiseout.correlation import Merge, UnitMoments
from rewire.nn.forward.tensors import head, rows
from rewire.nn.surgery import UnitGraph

__all__ = ["Inputs", "choose", "first_inputs", "next_merge"]


class Inputs:
    """The inputs of the data's batches, to go through again and again."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return map(_input, self._data)


def _input(batch: Any) -> Any:
    """A batch is the input, or a tuple or list that begins with it."""
    return (
        batch[0]
        if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence)
        else batch
    )


def first_inputs(data: Data, samples: int) -> list[Any]:
    """Batches that hold the first so many inputs."""
    kept: list[Any] = []
    left = samples
    for batch in map(_input, data):
        kept.append(head(batch, left))
        left -= max(rows(batch), 1)
        if left <= 0:
            break
    return kept


def choose(graph: UnitGraph, only: Patterns | None) -> tuple[list[str], dict[str, str]]:
    """The layers whose units are merged, each set of coupled ones once, and why others are not."""
    patterns = ["*"] if only is None else [only] if isinstance(only, str) else list(only)
    chosen: list[str] = []
    refused: dict[str, str] = {}
    coupled: set[str] = set()
    for pattern in patterns:
        names = [name for name in graph.names if fnmatchcase(name, pattern)] or [pattern]
        for name in names:
            try:
                group = graph.group(name)
                if not group.consumers:
                    raise ValueError(f"nothing reads the units of {name}")
            except ValueError as error:
                if name == pattern:
                    raise
                refused[name] = str(error)
                continue
            if name not in coupled:
                chosen.append(name)
                coupled |= {site.name for site in group.producers}
    if not chosen:
        kinds = ", ".join(
            sorted({type(m).__name__ for m in graph.model.modules() if not list(m.children())})
        )
        raise ValueError(
            "no layer has units that can be merged: "
            + (
                "; ".join(refused.values())
                or f"none of {kinds or 'no layer'} has units of its own (Linear, Conv, ...)"
            )
        )
    return chosen, refused


def next_merge(
    graph: UnitGraph,
    moments: Mapping[str, UnitMoments],
    criterion: Literal["correlation", "damage"],
) -> Merge | None:
    """The best merge of any layer; None if no pair is left."""
    best_of = (m.best(criterion) for m in moments.values() if len(m.units) > m.group.least)
    found = [merge for merge in best_of if merge is not None]
    if criterion == "damage":
        parameters = {name: graph.parameters(m.group) for name, m in moments.items()}
        return min(found, key=lambda merge: merge.damage / parameters[merge.name], default=None)
    return max(found, key=lambda merge: merge.correlation, default=None)

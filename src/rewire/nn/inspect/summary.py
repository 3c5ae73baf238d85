"""A table of a model's sparse weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from rewire.nn.weight.listing import sparse_weights
from rewire.nn.weight.pool import SparseWeight

__all__ = ["Summary", "WeightSummary", "summary"]


@dataclass(frozen=True)
class WeightSummary:
    """One sparse weight: size, budget, degrees (minimum, mean, maximum), and the bytes of values,
    positions and index.
    """

    name: str
    shape: tuple[int, ...]
    connections: int
    capacity: int
    density: float
    fan_in: tuple[int, float, int]
    fan_out: tuple[int, float, int]
    bytes: int


@dataclass(frozen=True)
class Summary:
    """What `summary` returns; print it for a table."""

    weights: tuple[WeightSummary, ...]
    dense_parameters: int

    @property
    def connections(self) -> int:
        """Connections of all sparse weights."""
        return sum(w.connections for w in self.weights)

    @property
    def density(self) -> float:
        """Connections over potential connections, of all sparse weights."""
        total = sum(math.prod(w.shape) for w in self.weights)
        return self.connections / total if total else 0.0

    @property
    def bytes(self) -> int:
        """Of all sparse weights."""
        return sum(w.bytes for w in self.weights)

    def __str__(self) -> str:
        ranges = "fan-in min/mean/max", "fan-out min/mean/max"
        table = [("weight", "shape", "connections", "density", *ranges, "bytes")]
        for w in self.weights:
            shape, degrees = (
                " x ".join(map(str, w.shape)),
                (_degrees(w.fan_in), _degrees(w.fan_out)),
            )
            table.append((w.name, shape, *_budget(w), *degrees, f"{w.bytes:,}"))
        table.append(("total", "", *_budget(self), "", "", f"{self.bytes:,}"))
        width = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for row in table:
            cells = [cell.rjust(w) for cell, w in zip(row, width, strict=True)]
            cells[:2] = [cell.ljust(w) for cell, w in zip(row[:2], width[:2], strict=True)]
            lines.append("  ".join(cells))
        rule = "-" * len(lines[0])
        head, *body, total = (line.rstrip() for line in lines)
        rest = f"other parameters: {self.dense_parameters:,}"
        return "\n".join([head, rule, *body, rule, total, rest])


def summary(model: nn.Module) -> Summary:
    """Connections, density, fan-in, fan-out and bytes of every sparse weight of ``model``.

    Cost: O(rows + cols) for each.
    """
    pools = list(sparse_weights(model))
    mine = {id(weight.values) for _, weight in pools}
    return Summary(
        tuple(_describe(name, weight) for name, weight in pools),
        sum(p.numel() for p in model.parameters() if id(p) not in mine),
    )


def _describe(name: str, weight: SparseWeight) -> WeightSummary:
    tensors: Iterable[Tensor] = (weight.values, weight.rows, weight.cols, *weight.index)
    return WeightSummary(
        name,
        tuple(weight.shape),
        weight.connections,
        weight.capacity,
        weight.density,
        _range(weight.fan_in()),
        _range(weight.fan_out()),
        sum(t.numel() * t.element_size() for t in tensors),
    )


def _budget(w: WeightSummary | Summary) -> tuple[str, str]:
    return f"{w.connections:,}", f"{w.density:.4%}"


def _range(degrees: Tensor) -> tuple[int, float, int]:
    return int(degrees.min()), float(degrees.double().mean()), int(degrees.max())


def _degrees(d: tuple[int, float, int]) -> str:
    return f"{d[0]} / {d[1]:.1f} / {d[2]}"

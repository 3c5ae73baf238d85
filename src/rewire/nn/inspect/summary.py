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
    """One pool: its size, budget and degrees (minimum, mean, maximum), and the bytes of values,
    topology and index.
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
        """Connections of all pools."""
        return sum(w.connections for w in self.weights)

    @property
    def density(self) -> float:
        """Connections over potential connections, of all pools."""
        total = sum(math.prod(w.shape) for w in self.weights)
        return self.connections / total if total else 0.0

    @property
    def bytes(self) -> int:
        """Of all pools."""
        return sum(w.bytes for w in self.weights)

    def __str__(self) -> str:
        head = (
            "weight",
            "shape",
            "connections",
            "density",
            "fan-in min/mean/max",
            "fan-out min/mean/max",
            "bytes",
        )
        rows = [
            (
                w.name,
                " x ".join(map(str, w.shape)),
                f"{w.connections:,}",
                f"{w.density:.4%}",
                _degrees(w.fan_in),
                _degrees(w.fan_out),
                f"{w.bytes:,}",
            )
            for w in self.weights
        ]
        total = (
            "total",
            "",
            f"{self.connections:,}",
            f"{self.density:.4%}",
            "",
            "",
            f"{self.bytes:,}",
        )
        table = [head, *rows, total]
        width = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            "  ".join(
                c.ljust(w) if i < 2 else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, width, strict=True))
            )
            for row in table
        ]
        rule = "-" * len(lines[0])
        body = [
            lines[0].rstrip(),
            rule,
            *(line.rstrip() for line in lines[1:-1]),
            rule,
            lines[-1].rstrip(),
        ]
        return "\n".join([*body, f"other parameters: {self.dense_parameters:,}"])


def summary(model: nn.Module) -> Summary:
    """Connections, density, fan-in, fan-out and bytes of every sparse weight of ``model``. O(rows +
    cols).
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


def _range(degrees: Tensor) -> tuple[int, float, int]:
    return int(degrees.min()), float(degrees.double().mean()), int(degrees.max())


def _degrees(d: tuple[int, float, int]) -> str:
    return f"{d[0]} / {d[1]:.1f} / {d[2]}"

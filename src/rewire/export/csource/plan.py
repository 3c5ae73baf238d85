"""A network as a list of steps over buffers, with its weights: what a C source is written from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewire.nn.frozen import quantize
from rewire.nn.frozen.quantize import Values

__all__ = ["TYPES", "Buffer", "Matrix", "Plan", "Step", "c_float", "smallest"]

#: C types of arrays, with their bytes.
TYPES = {"uint8_t": 1, "uint16_t": 2, "uint32_t": 4, "int8_t": 1, "float": 4}


def smallest(largest: int) -> str:
    """The smallest type of whole numbers that holds ``largest``."""
    return next(n for n, size in TYPES.items() if n[0] == "u" and largest < 1 << 8 * size)


def c_float(value: float) -> str:
    """A float constant of C, exact for numbers of float32."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number that C source can hold")
    text = f"{value:.9g}"
    return f"{text}f" if any(c in text for c in ".e") else f"{text}.0f"


@dataclass(eq=False)
class Buffer:
    """Floats that steps write and read, with the shape that they have in PyTorch.

    Attributes:
        place: "input", "output" or "workspace"; offset: within the workspace.
        first, last: the steps that write it first and read it last.
        error: how far its floats can be from those of the exact weights; None if unknown.
        largest: the largest magnitude that it had for the example.
    """

    size: int
    place: str = "workspace"
    offset: int = 0
    first: int = 0
    last: int = 0
    error: float | None = 0.0
    largest: float = 0.0


@dataclass(frozen=True)
class Step:
    """A statement of C; ``$0``, ``$1``, ... stand for pointers to its buffers."""

    code: str
    buffers: tuple[Buffer, ...]


@dataclass(eq=False)
class Matrix:
    """A weight as it is written: connections by row, or all numbers of a dense matrix.

    Attributes:
        name: what the C arrays are called. title: the layer's name in the model.
        cols: None for a dense matrix.
        values: floats, or int8 codes. scale: by row, with codes.
        stored: "float", "int8" or "ternary".
    """

    name: str
    title: str
    rows: Tensor
    cols: Tensor | None
    values: Tensor
    shape: tuple[int, int]
    bias: Tensor | None
    scale: Tensor | None = None
    stored: Values = "float"
    error: float = 0.0
    bound: float = 0.0

    def times(self, factor: Tensor, shift: Tensor) -> None:
        """Follow the product by ``y * factor + shift``, a number for each row."""
        if self.scale is None:
            self.values = self.values * factor[self.rows]
        else:
            self.scale = self.scale * factor
            self.bound *= float(factor.abs().max())
        bias = torch.zeros_like(shift) if self.bias is None else self.bias
        self.bias = bias * factor + shift

    def round(self, values: Values) -> None:
        """Store the numbers as ``values`` says, unless they are rounded already."""
        if values == "float" or self.scale is not None:
            return
        exact = self.values
        if not exact.isfinite().all():
            raise ValueError(f"{self.title} has values that are not finite; no {values} holds them")
        codes, scale = quantize.rounded(values, self.rows, exact.float(), self.shape[0])
        stored = codes.double() * scale.double()[self.rows]
        self.error, self.bound = quantize.deviation(self.rows, exact, stored, self.shape[0])
        self.values, self.scale, self.stored = codes, scale.double(), values
        if values == "ternary":
            there = codes != 0
            columns = (
                torch.arange(codes.numel()) % self.shape[1] if self.cols is None else self.cols
            )
            self.rows, self.cols, self.values = self.rows[there], columns[there], codes[there]

    def norm(self) -> float:
        """The largest sum of magnitudes over a row."""
        sizes = self.values.double().abs()
        sums = self._row_sums(sizes if self.scale is None else sizes * self.scale.abs()[self.rows])
        return float(sums.max())

    def _row_sums(self, numbers: Tensor) -> Tensor:
        return torch.zeros(self.shape[0], dtype=torch.float64).index_add_(0, self.rows, numbers)


@dataclass
class Plan:
    """Everything that a C source says.

    Attributes:
        helpers: C functions that the steps call, by name.
        arrays: float constants that are no weights, by name.
        multiply_adds: of one call.
    """

    steps: list[Step] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    helpers: dict[str, str] = field(default_factory=dict)
    multiply_adds: int = 0
    uses_math: bool = False
    workspace: int = 0
    result: Buffer | None = None

    def buffer(self, like: Tensor, **more: Any) -> Buffer:
        """A new buffer for a tensor such as ``like``."""
        finite = like.numel() and bool(like.isfinite().all())
        return Buffer(like.numel(), largest=float(like.abs().max()) if finite else 0.0, **more)

    def add(self, code: str, buffers: Sequence[Buffer]) -> None:
        """Append a step."""
        self.steps.append(Step(code, tuple(buffers)))

    def array(self, name: str, numbers: Tensor) -> str:
        """Keep constants, and return the name of their C array."""
        self.arrays[name] = numbers.detach().double().flatten()
        return name

    def place(self) -> None:
        """Lay the buffers out in the workspace, so that those that are needed at the same time do
        not overlap. First fit, in the order of their first steps.
        """
        found: dict[int, Buffer] = {}
        for number, step in enumerate(self.steps):
            for buffer in step.buffers:
                if buffer.place == "workspace":
                    if id(buffer) not in found:
                        found[id(buffer)] = buffer
                        buffer.first = number
                    buffer.last = number
        placed: list[Buffer] = []
        for buffer in found.values():
            others = [b for b in placed if b.last >= buffer.first]
            at = 0
            for other in sorted(others, key=lambda b: b.offset):
                if at + buffer.size <= other.offset:
                    break
                at = max(at, other.offset + other.size)
            buffer.offset = at
            placed.append(buffer)
        self.workspace = max((b.offset + b.size for b in placed), default=0)

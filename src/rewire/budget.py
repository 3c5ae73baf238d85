"""How many connections each weight may have: pure functions from shapes and a total to counts.

The counts sum to ``total`` exactly, and each is between 1 and the weight's size. Shapes are those
of the weights, output dimension first, kernel dimensions last: ``(out, in)``, ``(out, in, kh,
kw)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

__all__ = [
    "DISTRIBUTIONS",
    "Limits",
    "allowed",
    "connections_of",
    "distribute",
    "er",
    "erk",
    "starting",
    "uniform",
]

Shapes = Sequence[Sequence[int]]


def uniform(shapes: Shapes, total: int) -> list[int]:
    """The same density for every weight."""
    return _allot([1.0] * len(shapes), shapes, total)


def er(shapes: Shapes, total: int) -> list[int]:
    """Erdos-Renyi (SET, Mocanu et al. 2018): density proportional to ``(n_in + n_out) / (n_in
    n_out)``.

    Dimensions of a kernel do not count. Weights that would exceed density 1 become dense, and the
    others share the rest.
    """
    return _allot([(s[0] + s[1]) / (s[0] * s[1]) for s in _checked(shapes)], shapes, total)


def erk(shapes: Shapes, total: int) -> list[int]:
    """Erdos-Renyi-Kernel (RigL, Evci et al. 2020): density proportional to ``sum(dims) /
    prod(dims)``, with the kernel's dimensions.
    """
    return _allot([sum(s) / math.prod(s) for s in _checked(shapes)], shapes, total)


#: The distributions by name.
DISTRIBUTIONS: Mapping[str, Callable[[Shapes, int], list[int]]] = {
    "uniform": uniform,
    "er": er,
    "erk": erk,
}


def distribute(name: str, shapes: Shapes, total: int) -> list[int]:
    """Apply the distribution called ``name`` (see `DISTRIBUTIONS`)."""
    if name not in DISTRIBUTIONS:
        raise ValueError(
            f"unknown distribution {name!r}: choose one of {', '.join(sorted(DISTRIBUTIONS))}"
        )
    return DISTRIBUTIONS[name](shapes, total)


def connections_of(density: float, size: int) -> int:
    """The number of connections of a weight of ``size`` potential ones at ``density``.

    Raises ValueError for a density outside (0, 1] (also NaN), or so small that no connection would
    be left.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be above 0 and at most 1, not {density}")
    connections = round(density * size)
    if connections < 1:
        raise ValueError(
            f"density {density} leaves a weight of {size} potential connections without any: use "
            f"at least {1 / size:.3g}, or give connections="
        )
    return connections


def starting(
    density: float, shapes: Shapes, budgets: Sequence[int], limits: Limits | None = None
) -> list[int]:
    """Connections that weights begin with which come down to ``budgets``.

    Each has ``density``, or less where ``limits`` allow less; but at least its budget.
    """
    counts = []
    for k, shape in zip(budgets, shapes, strict=True):
        size = math.prod(shape)
        most = size if limits is None else limits.maximum(shape[0], size // shape[0])
        counts.append(max(k, min(round(density * size), most)))
    return counts


def allowed(size: int, connections: int | None = None, density: float | None = None) -> int:
    """K of a weight of ``size`` potential connections, from exactly one of ``connections`` and
    ``density``.

    Raises ValueError if both or neither are given, or K is not a whole number from 1 to ``size``.
    """
    if (connections is None) == (density is None):
        raise ValueError("give exactly one of connections= and density=")
    if density is not None:
        return connections_of(density, size)
    assert connections is not None
    if not 1 <= connections <= size or int(connections) != connections:
        raise ValueError(
            f"connections must be a whole number between 1 and {size} (all potential ones), not "
            f"{connections}"
        )
    return int(connections)


def _checked(shapes: Shapes) -> Shapes:
    for shape in shapes:
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(
                "a weight needs at least two dimensions, all of them at least 1, not "
                f"{tuple(shape)}"
            )
    return shapes


def _allot(weights: Sequence[float], shapes: Shapes, total: int) -> list[int]:
    """Counts in [1, size], proportional to weight x size, that sum to ``total``: water filling,
    then largest remainders.
    """
    sizes = [math.prod(s) for s in _checked(shapes)]
    if not len(sizes) <= total <= sum(sizes):
        raise ValueError(
            f"a total of {total} connections cannot be spread over {len(sizes)} weights of sizes "
            f"{sizes}: choose between {len(sizes)} (one each) and {sum(sizes)} (all)"
        )
    share = [w * n for w, n in zip(weights, sizes, strict=True)]
    fixed: dict[int, int] = {}
    while True:
        free = [i for i in range(len(sizes)) if i not in fixed]
        left = total - sum(fixed.values())
        scale = left / sum(share[i] for i in free) if free else 0.0
        full = {i: sizes[i] for i in free if share[i] * scale >= sizes[i]}
        # First those that become dense: the scale of the others rises, and those below 1 may get
        # more.
        bound = full or {i: 1 for i in free if share[i] * scale < 1}
        if not bound:
            break
        fixed |= bound
    exact = {i: share[i] * scale for i in free}
    counts = [fixed.get(i, math.floor(exact.get(i, 0))) for i in range(len(sizes))]
    by_remainder = sorted(free, key=lambda i: (math.floor(exact[i]) - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return _settle(counts, sizes, total)


def _settle(counts: list[int], sizes: Sequence[int], total: int) -> list[int]:
    """Make the total exact, from which weights at their bounds can leave a small difference."""
    while (off := total - sum(counts)) != 0:
        if off > 0:
            i = max(range(len(sizes)), key=lambda i: sizes[i] - counts[i])
            counts[i] += min(off, sizes[i] - counts[i])
        else:
            i = max(range(len(sizes)), key=lambda i: counts[i])
            counts[i] -= min(-off, counts[i] - 1)
    return counts


@dataclass(frozen=True)
class Limits:
    """The most connections that hardware allows a row, a column, and a block of a weight's matrix.

    fan_in: of one row (output neuron).
    fan_out: of one column (input).
    block: (rows, cols, count): of one of the blocks of rows x cols into which the matrix is cut,
        smaller ones at its ends (such as the cores of a neuromorphic chip).

    None is no limit. Raises ValueError for anything but whole numbers of at least 1.
    """

    fan_in: int | None = None
    fan_out: int | None = None
    block: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.block is not None:
            if len(self.block) != 3:
                raise ValueError(
                    f"block must be three numbers, (rows, cols, count), not {self.block}"
                )
            object.__setattr__(self, "block", tuple(self.block))
        given = [(n, v) for n in ("fan_in", "fan_out") if (v := getattr(self, n)) is not None]
        names = "rows of a block", "cols of a block", "count of a block"
        for name, number in (*given, *zip(names, self.block or (), strict=False)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {number}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The limits that are set: of "fan-in", "fan-out" and "block"."""
        given = {"fan-in": self.fan_in, "fan-out": self.fan_out, "block": self.block}
        return tuple(name for name, limit in given.items() if limit is not None)

    def as_numbers(self) -> list[int]:
        """Five numbers for a file: fan-in, fan-out, block; -1 is no limit."""
        numbers = self.fan_in, self.fan_out, *(self.block or (None, None, None))
        return [-1 if n is None else n for n in numbers]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> Limits:
        """The inverse of `as_numbers`; raises ValueError for other numbers."""
        if len(numbers) != 5:
            raise ValueError(f"limits are five numbers, not {len(numbers)}")
        fan_in, fan_out, *block = (None if n == -1 else int(n) for n in numbers)
        return cls(fan_in, fan_out, None if block == [None] * 3 else tuple(block))  # type: ignore[arg-type]

    def maximum(self, rows: int, cols: int) -> int:
        """The most connections that a rows x cols matrix can have within the limits; exact, O(1).

        This is a maximum flow from bands of rows to bands of columns through the blocks, because
        connections can always be spread evenly within a block and over the rows of a band. All
        bands but the last are equal, and the capacity of a cut is bilinear in the number of them on
        its near side, so a minimal cut has all or none of them there: there are 16 cuts to compare.
        """
        height, width, count = self.block or (rows, cols, rows * cols)
        fan_in, fan_out = min(self.fan_in or cols, cols), min(self.fan_out or rows, rows)
        row_bands = ((rows // height, height), (1, rows % height))
        col_bands = ((cols // width, width), (1, cols % width))

        def capacity(near: tuple[bool, ...]) -> int:
            rows_in = list(zip(row_bands, near[:2], strict=True))
            cols_in = list(zip(col_bands, near[2:], strict=True))
            out = sum(n * h * fan_in for (n, h), inside in rows_in if not inside)
            out += sum(n * w * fan_out for (n, w), inside in cols_in if inside)
            for ((n, h), a), ((m, w), b) in product(rows_in, cols_in):
                out += n * m * min(count, h * w) if a and not b else 0
            return out

        return min(capacity(near) for near in product((False, True), repeat=4))

    def check(self, rows: int, cols: int, connections: int) -> None:
        """Raise ValueError if a rows x cols matrix cannot have ``connections`` within the
        limits.
        """
        most = self.maximum(rows, cols)
        if connections > most:
            raise ValueError(
                f"{connections} connections do not fit a {rows} x {cols} matrix within {self}: at "
                f"most {most} do; allow fewer connections or raise the limits"
            )

    def __str__(self) -> str:
        rows, cols, most = self.block or (0, 0, 0)
        words = {
            "fan-in": f"fan-in {self.fan_in}",
            "fan-out": f"fan-out {self.fan_out}",
            "block": f"{most} per block of {rows} x {cols}",
        }
        return ", ".join(words[kind] for kind in self.kinds) or "no limits"

"""Small pools as lists of positions, and their index by brute force."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from rewire.topology import Index

EMPTY = (-1, -1)


Slots = list[tuple[int, int]]


def pool(slots: Slots, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
    rows, cols = ([s[axis] for s in slots] for axis in (0, 1))
    return torch.tensor(rows, dtype=dtype), torch.tensor(cols, dtype=dtype)


def brute(slots: Slots, n_rows: int, n_cols: int) -> list[list[int]]:
    """The six lists, straight from their contract in docs/architecture.md."""
    active = [(r, c, k) for k, (r, c) in enumerate(slots) if r >= 0]
    lists: list[list[int]] = []
    for own, foreign, count in ((0, 1, n_rows), (1, 0, n_cols)):
        ordered = sorted(active, key=lambda s: (s[own], s[foreign]))
        blank = [0] * (len(slots) - len(ordered))
        lists.append([sum(s[own] < i for s in ordered) for i in range(count + 1)])
        lists.append([s[foreign] for s in ordered] + blank)
        lists.append([s[2] for s in ordered] + blank)
    return lists


def as_lists(index: Index) -> list[list[int]]:
    return [t.tolist() for t in index]


@st.composite
def pools(draw: st.DrawFn) -> tuple[Slots, int, int]:
    n_rows, n_cols = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    positions = [(r, c) for r in range(n_rows) for c in range(n_cols)]
    chosen = draw(st.lists(st.sampled_from(positions), unique=True))
    slots: Slots = draw(st.permutations(chosen + [EMPTY] * draw(st.integers(0, 4))))
    return list(slots), n_rows, n_cols

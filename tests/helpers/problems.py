"""Random products and their dense truth, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from rewire.topology import Index


@dataclass
class Problem:
    """A sparse weight by index and by slot, and the same weight dense."""

    index: Index
    values: Tensor
    rows: Tensor  # of every slot, -1 where empty
    cols: Tensor
    dense: Tensor
    shape: tuple[int, int]

    @property
    def by_row(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.index.row_ptr, self.index.row_cols, self.index.row_slots

    @property
    def by_col(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.index.col_ptr, self.index.col_rows, self.index.col_slots

    def at_slots(self, matrix: Tensor) -> Tensor:
        """The entries of a rows x cols matrix at each slot; 0 at empty ones."""
        out = matrix.new_zeros(self.values.shape)
        active = self.rows >= 0
        out[active] = matrix[self.rows[active], self.cols[active]]
        return out


def problem(
    n_rows: int,
    n_cols: int,
    connections: int,
    *,
    spare: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int32,
    skewed: bool = False,
) -> Problem:
    """A random topology in random slots, ``spare`` of them empty; with ``skewed``, rows and columns
    of low number have most of the connections. The lists are made here, independently of
    rewire.topology.
    """
    generator = torch.Generator().manual_seed(seed)
    total = n_rows * n_cols
    if skewed and connections:
        chance = 1.0 / (1.0 + torch.arange(n_rows)[:, None]) / (1.0 + torch.arange(n_cols)[None, :])
        keys = torch.multinomial(chance.flatten(), connections, generator=generator)
    else:
        keys = torch.randperm(total, generator=generator)[:connections]
    capacity = connections + spare
    chosen = torch.randperm(capacity, generator=generator)[:connections]
    rows, cols = torch.full((capacity,), -1), torch.full((capacity,), -1)
    rows[chosen], cols[chosen] = keys // n_cols, keys % n_cols
    values = torch.zeros(capacity, dtype=dtype)
    values[chosen] = torch.randn(connections, generator=generator, dtype=dtype)
    lists: list[Tensor] = []
    for own, other, count, major in ((rows, cols, n_rows, n_cols), (cols, rows, n_cols, n_rows)):
        order = chosen[torch.argsort(own[chosen] * major + other[chosen])]
        ptr = torch.zeros(count + 1, dtype=torch.int64)
        ptr[1:] = torch.bincount(own[chosen], minlength=count).cumsum(0)
        padding = torch.zeros(spare, dtype=torch.int64)
        lists += [ptr, torch.cat([other[order], padding]), torch.cat([order, padding])]
    dense = torch.zeros(n_rows, n_cols, dtype=dtype)
    dense[rows[chosen], cols[chosen]] = values[chosen]
    return Problem(
        Index(*(t.to(index_dtype) for t in lists)), values, rows, cols, dense, (n_rows, n_cols)
    )


def in_layout(x: Tensor, layout: str) -> Tensor:
    """``x`` (batch, features), or for "expanded" layouts a broadcast of a part of it, in other
    strides.
    """
    if layout == "row-major":
        return x.contiguous()
    if layout == "feature-major":
        return x.t().contiguous().t()
    if layout == "sliced":  # every second row of a wider matrix
        wide = torch.zeros(2 * x.shape[0], x.shape[1] + 3, dtype=x.dtype)
        wide[::2, 2 : x.shape[1] + 2] = x
        return wide[::2, 2 : x.shape[1] + 2]
    if layout == "feature-major slice":
        wide = torch.zeros(x.shape[1], x.shape[0] + 5, dtype=x.dtype)
        wide[:, 3 : x.shape[0] + 3] = x.t()
        return wide[:, 3 : x.shape[0] + 3].t()
    if layout == "expanded batch":
        return x[:1].expand(x.shape)
    if layout == "expanded features":
        return x[:, :1].expand(x.shape)
    assert layout == "expanded both"
    return x[:1, :1].expand(x.shape)


LAYOUTS = (
    "row-major",
    "feature-major",
    "sliced",
    "feature-major slice",
    "expanded batch",
    "expanded features",
    "expanded both",
)

BATCHES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 63, 100, 127, 128, 129, 257, 1000)


@st.composite
def problems(draw):
    n_rows, n_cols = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    share = draw(st.sampled_from((0.0, 0.02, 0.1, 0.5, 1.0)))
    return problem(
        n_rows,
        n_cols,
        round(share * n_rows * n_cols),
        spare=draw(st.sampled_from((0, 0, 1, 9))),
        seed=draw(st.integers(0, 999)),
        dtype=draw(st.sampled_from((torch.float32, torch.float64))),
        index_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        skewed=draw(st.booleans()),
    )


def close(y, expected, tolerance=1e-2):
    """Relative error of the whole result, and of each number beside the largest."""
    assert y.shape == expected.shape
    error = y.double() - expected
    assert error.norm() <= tolerance * expected.norm()
    if expected.numel():
        assert error.abs().max() <= tolerance * expected.abs().max()


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, the sign bits of zeros too, in which the signs of new connections are kept."""
    bits = (torch.signbit(t) if t.is_floating_point() else t for t in (a, b))
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(*bits)

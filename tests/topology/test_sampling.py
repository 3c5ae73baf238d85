"""First topologies, candidates and dormant positions, and their laws."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rewire import topology
from rewire.topology import TopologyError
from slot_pools import EMPTY, Slots, pool, pools


@pytest.mark.parametrize("k", [0, 1, 5, 11, 12])
def test_first_topology_is_exact_and_sorted(k: int) -> None:
    rows, cols = topology.sample(3, 4, k, 9)
    keys = rows * 4 + cols
    assert keys.numel() == k
    assert torch.equal(keys, keys.unique())
    topology.build_index(rows, cols, 3, 4)


def test_first_topology_is_uniform() -> None:
    number = {s: i for i, s in enumerate(itertools.combinations(range(6), 2))}
    seen = np.zeros(len(number))
    for seed in range(2000):
        rows, cols = topology.sample(2, 3, 2, seed)
        seen[number[tuple((rows * 3 + cols).tolist())]] += 1
    assert stats.chisquare(seen).pvalue > 1e-4


@pytest.mark.parametrize("k", [-1, 13])
def test_first_topology_refuses(k: int) -> None:
    with pytest.raises(TopologyError, match=rf"{k} connections do not fit a 3 x 4 matrix"):
        topology.sample(3, 4, k, 0)


@st.composite
def with_dropped(draw: st.DrawFn) -> tuple[Slots, int, int, Slots]:
    slots, n_rows, n_cols = draw(pools())
    active = [s for s in slots if s != EMPTY]
    dropped = draw(st.lists(st.sampled_from(active), unique=True)) if active else []
    return slots, n_rows, n_cols, dropped


@given(with_dropped(), st.sampled_from([torch.int32, torch.int64]))
def test_candidates_is_a_bijection(
    given_: tuple[Slots, int, int, Slots], dtype: torch.dtype
) -> None:
    slots, n_rows, n_cols, dropped = given_
    index = topology.build_index(*pool(slots, dtype), n_rows, n_cols)
    dormant = [p for p in itertools.product(range(n_rows), range(n_cols)) if p not in slots]
    expected = dormant + dropped  # in this very order
    ranks = torch.randperm(len(expected))
    rows, cols = topology.candidates(index, n_rows, n_cols, ranks, *pool(dropped, torch.int64))
    assert rows.dtype == cols.dtype == torch.int64
    drawn = list(zip(rows.tolist(), cols.tolist(), strict=True))
    assert drawn == [expected[u] for u in ranks.tolist()]


@given(with_dropped(), st.integers(0, 2**32 - 1))
def test_dormant_ones_are_dormant(given_: tuple[Slots, int, int, Slots], step: int) -> None:
    slots, n_rows, n_cols, dropped = given_
    index = topology.build_index(*pool(slots), n_rows, n_cols)
    kept = set(slots) - set(dropped) - {EMPTY}
    free = n_rows * n_cols - len(kept)
    for n in {0, min(1, free), free // 2, free}:
        rows, cols = topology.sample_dormant(
            index, n_rows, n_cols, n, *pool(dropped, torch.int64), 1, step, 2
        )
        drawn = list(zip(rows.tolist(), cols.tolist(), strict=True))
        assert len(set(drawn)) == len(drawn) == n
        assert kept.isdisjoint(drawn)
        assert all(0 <= r < n_rows and 0 <= c < n_cols for r, c in drawn)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_dormant_ones_are_drawn_uniformly(n: int) -> None:
    slots: Slots = [(0, 0), (0, 1), (0, 2), (1, 1), EMPTY, (2, 0)]  # a full row, and holes
    dropped: Slots = [(0, 1), (2, 0)]
    index = topology.build_index(*pool(slots), 3, 3)
    open_ = [p for p in itertools.product(range(3), range(3)) if p not in slots or p in dropped]
    number = {frozenset(s): i for i, s in enumerate(itertools.combinations(open_, n))}
    seen = np.zeros(len(number))
    for step in range(1500):
        rows, cols = topology.sample_dormant(
            index, 3, 3, n, *pool(dropped, torch.int64), 23, step, 1
        )
        seen[number[frozenset(zip(rows.tolist(), cols.tolist(), strict=True))]] += 1
    assert stats.chisquare(seen).pvalue > 1e-4


def test_more_than_is_dormant_is_refused() -> None:
    index = topology.build_index(*pool([(0, 0), (1, 1)]), 2, 2)
    for n in (4, -1):
        with pytest.raises(TopologyError, match=f"cannot grow {n} connections where 3 are dormant"):
            topology.sample_dormant(index, 2, 2, n, *pool([(0, 0)], torch.int64), 0, 0, 0)


def test_a_full_matrix_grows_only_what_it_dropped() -> None:
    slots = list(itertools.product(range(3), range(3)))
    index = topology.build_index(*pool(slots), 3, 3)
    none = pool([], torch.int64)
    assert topology.sample_dormant(index, 3, 3, 0, *none, 0, 0, 0)[0].numel() == 0
    dropped: Slots = [(1, 2), (0, 0)]
    rows, cols = topology.sample_dormant(index, 3, 3, 2, *pool(dropped, torch.int64), 0, 0, 0)
    assert set(zip(rows.tolist(), cols.tolist(), strict=True)) == set(dropped)


def test_sampling_depends_on_positions_not_on_slots() -> None:
    slots: Slots = [(0, 0), (0, 3), (1, 1), (2, 0), (3, 3)]
    dropped = pool([(0, 3)], torch.int64)
    a = topology.build_index(*pool(slots), 4, 4)
    b = topology.build_index(*pool([EMPTY, *slots[::-1], EMPTY]), 4, 4)
    for draw in (
        lambda i: torch.stack(topology.sample_dormant(i, 4, 4, 5, *dropped, 3, 1, 1)),
        lambda i: topology.sample_dormant_in_rows(i, 4, 4, *dropped, 3, 1, 1),
    ):
        assert torch.equal(draw(a), draw(b))


@given(with_dropped(), st.integers(0, 1000))
def test_in_rows_keeps_every_fan_in(given_: tuple[Slots, int, int, Slots], step: int) -> None:
    slots, n_rows, n_cols, dropped = given_
    dropped = sorted(dropped, key=lambda p: p[0])
    index = topology.build_index(*pool(slots), n_rows, n_cols)
    cols = topology.sample_dormant_in_rows(
        index, n_rows, n_cols, *pool(dropped, torch.int64), 4, step, 1
    )
    assert cols.dtype == torch.int64
    kept = set(slots) - set(dropped) - {EMPTY}
    grown = [(r, c) for (r, _), c in zip(dropped, cols.tolist(), strict=True)]
    assert len(kept | set(grown)) == len(kept) + len(dropped)
    assert all(0 <= c < n_cols for _, c in grown)


def test_in_rows_is_uniform_and_rows_are_independent() -> None:
    # Hundreds of pairs of rows in one matrix: even rows draw 2 of {1} + {3, 0}, odd rows 1 of {0} +
    # {2}.
    pairs = 900
    slots = [
        (2 * i + r, c)
        for i in range(pairs)
        for r, c in ((0, 0), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3))
    ]
    dropped = [(2 * i + r, c) for i in range(pairs) for r, c in ((0, 3), (0, 0), (1, 2))]
    index = topology.build_index(*pool(slots), 2 * pairs, 4)
    drawn = topology.sample_dormant_in_rows(
        index, 2 * pairs, 4, *pool(dropped, torch.int64), 5, 7, 1
    )
    outcomes = list(itertools.product(itertools.combinations((0, 1, 3), 2), (0, 2)))
    seen = Counter((tuple(sorted((a, b))), c) for a, b, c in drawn.view(pairs, 3).tolist())
    assert set(seen) == set(outcomes)
    assert stats.chisquare([seen[o] for o in outcomes]).pvalue > 1e-4


def test_in_rows_of_full_rows_and_of_nothing() -> None:
    slots = list(itertools.product(range(3), range(2)))
    index = topology.build_index(*pool(slots), 3, 2)
    dropped: Slots = [(0, 1), (2, 0), (2, 1)]
    cols = topology.sample_dormant_in_rows(
        index, 3, 2, *pool(dropped, torch.int64), 0, 0, 0
    ).tolist()
    assert cols[0] == 1
    assert sorted(cols[1:]) == [0, 1]
    assert topology.sample_dormant_in_rows(index, 3, 2, *pool([], torch.int64), 0, 0, 0).shape == (
        0,
    )


def test_filling_rows_is_uniform_over_what_is_free() -> None:
    """Row 0 has one connection and draws 2 of the 4 other columns, row 1 none of 5, row 2 all that
    are left.
    """
    rows, cols = torch.tensor([2, 0, 2, 1]), torch.tensor([4, 1, 0, 3])
    need = torch.tensor([2, 0, 3, 1])
    seen: Counter[tuple[int, ...]] = Counter()
    for step in range(2000):
        new_rows, new_cols = topology.sample_in_rows(rows, cols, 4, 5, need, 5, step, 1)
        assert new_rows.tolist() == [0, 0, 2, 2, 2, 3]
        assert sorted(new_cols[2:5].tolist()) == [1, 2, 3]
        seen[(*sorted(new_cols[:2].tolist()), int(new_cols[5]))] += 1
    pairs = list(itertools.combinations((0, 2, 3, 4), 2))
    assert set(seen) == {(*pair, c) for pair in pairs for c in range(5)}
    assert stats.chisquare(list(seen.values())).pvalue > 1e-4
    for wrong in (torch.tensor([1]), torch.tensor([0, -1, 0, 0])):
        with pytest.raises(
            topology.TopologyError,
            match="need must have a number of at least 0 for each of the 4 rows",
        ):
            topology.sample_in_rows(rows, cols, 4, 5, wrong, 5, 0, 1)
    with pytest.raises(topology.TopologyError, match="row 2 has 3 columns left, not 4"):
        topology.sample_in_rows(rows, cols, 4, 5, torch.tensor([0, 0, 4, 0]), 5, 0, 1)

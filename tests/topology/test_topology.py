"""Index algebra against brute force on small matrices, laws of sampling, and sizes that only O(K)
code survives.
"""

from __future__ import annotations

import itertools
import resource

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewire import topology
from rewire.topology import TopologyError
from slot_pools import EMPTY, Slots, as_lists, brute, pool, pools

# --- build_index ----------------------------------------------------------------------------------


@given(pools(), st.sampled_from([torch.int32, torch.int64]))
def test_index_equals_brute_force(given_: tuple[Slots, int, int], dtype: torch.dtype) -> None:
    slots, n_rows, n_cols = given_
    index = topology.build_index(*pool(slots, dtype), n_rows, n_cols)
    assert as_lists(index) == brute(slots, n_rows, n_cols)
    assert all(t.dtype == dtype for t in index)


def test_index_of_a_larger_matrix_equals_scipy() -> None:
    from scipy import sparse

    n_rows, n_cols, k = 300, 200, 5000
    rows, cols = topology.sample(n_rows, n_cols, k, 3)
    shuffle = torch.randperm(k)
    rows, cols = rows[shuffle].int(), cols[shuffle].int()
    index = topology.build_index(rows, cols, n_rows, n_cols)
    matrix = sparse.coo_array(
        (np.arange(k) + 1, (rows.numpy(), cols.numpy())), shape=(n_rows, n_cols)
    )
    by_row, by_col = matrix.tocsr(), matrix.tocsc()
    by_row.sort_indices()
    by_col.sort_indices()
    expected = (
        by_row.indptr,
        by_row.indices,
        by_row.data - 1,
        by_col.indptr,
        by_col.indices,
        by_col.data - 1,
    )
    for mine, theirs in zip(index, expected, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs)


def test_index_goes_into_the_given_tensors() -> None:
    out = topology.build_index(*pool([(0, 1), (1, 0), EMPTY]), 2, 2)
    before = [t.data_ptr() for t in out]
    again = topology.build_index(*pool([EMPTY, (1, 1), EMPTY]), 2, 2, out=out)
    assert all(a is b for a, b in zip(again, out, strict=True))
    assert [t.data_ptr() for t in out] == before
    assert as_lists(out) == brute([EMPTY, (1, 1), EMPTY], 2, 2)


BAD_POOLS = {
    "row too large": ([(0, 0), (3, 1)], r"connection \(3, 1\) is outside the 3 x 4 matrix"),
    "column too large": ([(0, 0), (2, 4)], r"connection \(2, 4\) is outside the 3 x 4 matrix"),
    "negative row": ([(-2, 0), (0, 0)], r"connection \(-2, 0\) is outside"),
    "negative column": ([(0, -2), (0, 0)], r"connection \(0, -2\) is outside"),
    "half empty, row": ([(-1, 2), (0, 0)], r"connection \(-1, 2\) is outside"),
    "half empty, column": ([(2, -1), (0, 0)], r"connection \(2, -1\) is outside"),
    "wholly outside": ([(-2, -2), (0, 0)], r"connection \(-2, -2\) is outside"),
    "duplicate": ([(1, 2), (1, 2)], r"connection \(1, 2\) occurs more than once"),
    "far": ([(2**31 - 1, 2**31 - 1), (0, 0)], r"is outside"),
}


@pytest.mark.parametrize("name", BAD_POOLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_error_leaves_out_unchanged(name: str, dtype: torch.dtype) -> None:
    slots, message = BAD_POOLS[name]
    out = topology.build_index(*pool([(2, 3), (0, 1)], dtype), 3, 4)
    before = as_lists(out)
    with pytest.raises(TopologyError, match=message):
        topology.build_index(*pool(slots, dtype), 3, 4, out=out)
    assert as_lists(out) == before


def test_shapes_must_agree() -> None:
    rows, cols = pool([(0, 0), (1, 1)])
    for bad in ((rows, cols[:1]), (rows[None], cols[None])):
        with pytest.raises(TopologyError, match="rows and cols must be 1-D and equally long"):
            topology.build_index(*bad, 2, 2)


# --- replace_ -------------------------------------------------------------------------------------


@st.composite
def changes(draw: st.DrawFn) -> tuple[Slots, int, int, list[int], Slots]:
    """A pool, slots to change, and what they shall hold: any mix of moving, swapping, emptying and
    filling.
    """
    slots, n_rows, n_cols = draw(pools())
    chosen = draw(st.lists(st.sampled_from(range(len(slots))), unique=True)) if slots else []
    kept = {s for k, s in enumerate(slots) if k not in chosen}
    free = [(r, c) for r in range(n_rows) for c in range(n_cols) if (r, c) not in kept]
    wanted = draw(st.permutations(free))[: len(chosen)]
    new = list(wanted) + [EMPTY] * (len(chosen) - len(wanted))
    emptied = draw(st.lists(st.booleans(), min_size=len(new), max_size=len(new)))
    return (
        slots,
        n_rows,
        n_cols,
        chosen,
        [EMPTY if e else p for p, e in zip(new, emptied, strict=True)],
    )


@given(changes(), st.sampled_from([torch.int32, torch.int64]))
def test_replace_equals_a_fresh_build(
    change: tuple[Slots, int, int, list[int], Slots], dtype: torch.dtype
) -> None:
    slots, n_rows, n_cols, chosen, new = change
    rows, cols = pool(slots, dtype)
    index = topology.build_index(rows, cols, n_rows, n_cols)
    held = [t.data_ptr() for t in (rows, cols, *index)]
    expected = list(slots)
    for k, position in zip(chosen, new, strict=True):
        expected[k] = position
    at = torch.tensor(chosen, dtype=torch.int64)
    k = topology.replace_(rows, cols, index, n_rows, n_cols, at, *pool(new, torch.int64))
    assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == expected
    assert as_lists(index) == brute(expected, n_rows, n_cols)
    assert k == sum(r >= 0 for r, _ in expected)
    assert [t.data_ptr() for t in (rows, cols, *index)] == held


# from few changes (a merge) to many (a rebuild)
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 1.0])
def test_replace_in_a_larger_pool(share: float) -> None:
    n_rows, n_cols, k, capacity = 200, 300, 6000, 6500
    generator = torch.Generator().manual_seed(1)
    rows = torch.full((capacity,), -1, dtype=torch.int32)
    cols = rows.clone()
    home = torch.randperm(capacity, generator=generator)[:k]
    drawn = topology.sample(n_rows, n_cols, k, 5)
    rows[home], cols[home] = drawn[0].int(), drawn[1].int()
    index = topology.build_index(rows, cols, n_rows, n_cols)
    for step in range(3):
        slots = torch.randperm(capacity, generator=generator)[: int(share * capacity)]
        was = slots[rows[slots] >= 0]
        n = min(slots.numel(), n_rows * n_cols - k + was.numel())
        new = topology.sample_dormant(
            index, n_rows, n_cols, n - n // 10, rows[was].long(), cols[was].long(), 1, step, 1
        )
        blank = torch.full((slots.numel() - new[0].numel(),), -1)
        topology.replace_(
            rows,
            cols,
            index,
            n_rows,
            n_cols,
            slots,
            torch.cat([new[0], blank]),
            torch.cat([new[1], blank]),
        )
        fresh = topology.build_index(rows, cols, n_rows, n_cols)
        assert all(torch.equal(a, b) for a, b in zip(index, fresh, strict=True))
        assert torch.equal(rows[slots].long(), torch.cat([new[0], blank]))


POOL: Slots = [(0, 1), (2, 3), EMPTY, (1, 1)]
BAD_CHANGES = {
    "slot too large": ([4], [(0, 0)], r"slot 4 is out of range or given twice: slots are 0 to 3"),
    "slot negative": ([-1], [(0, 0)], r"slot -1 is out of range"),
    "slot far": ([2**40], [(0, 0)], r"slot 1099511627776 is out of range"),
    "slot twice": ([1, 0, 1], [(0, 0), (0, 2), (0, 3)], r"slot 1 is out of range or given twice"),
    "slot twice, empty": ([1, 1], [EMPTY, EMPTY], r"slot 1 is out of range or given twice"),
    "row": ([1], [(3, 0)], r"connection \(3, 0\) is outside the 3 x 4 matrix"),
    "column": ([0, 1], [(0, 0), (0, 4)], r"connection \(0, 4\) is outside the 3 x 4 matrix"),
    "half empty": ([1], [(-1, 0)], r"connection \(-1, 0\) is outside"),
    "half empty too": ([1], [(1, -1)], r"connection \(1, -1\) is outside"),
    "beyond int32": ([1], [(2**32, 0)], r"connection \(4294967296, 0\) is outside"),
    "beyond int32 too": ([1], [(0, 2**32 - 1)], r"connection \(0, 4294967295\) is outside"),
    "active elsewhere": ([0], [(1, 1)], r"connection \(1, 1\) occurs more than once"),
    "active elsewhere, into an empty slot": (
        [2],
        [(0, 1)],
        r"connection \(0, 1\) occurs more than once",
    ),
    "twice among the new": ([0, 2], [(2, 2), (2, 2)], r"connection \(2, 2\) occurs more than once"),
}


@pytest.mark.parametrize("name", BAD_CHANGES)
def test_an_error_in_replace_changes_nothing(name: str) -> None:
    chosen, new, message = BAD_CHANGES[name]
    rows, cols = pool(POOL)
    index = topology.build_index(rows, cols, 3, 4)
    with pytest.raises(TopologyError, match=message):
        topology.replace_(rows, cols, index, 3, 4, torch.tensor(chosen), *pool(new, torch.int64))
    assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == POOL
    assert as_lists(index) == brute(POOL, 3, 4)


def test_replace_wants_equal_lengths() -> None:
    rows, cols = pool(POOL)
    index = topology.build_index(rows, cols, 3, 4)
    one, two = torch.tensor([0]), torch.tensor([0, 2])
    for bad in ((one, two, two), (two, two, one), (one[None], one[None], one[None])):
        with pytest.raises(TopologyError, match="1-D and equally long"):
            topology.replace_(rows, cols, index, 3, 4, *bad)
    assert as_lists(index) == brute(POOL, 3, 4)


def test_swapping_slots_and_staying_in_place() -> None:
    rows, cols = pool(POOL)
    index = topology.build_index(rows, cols, 3, 4)
    new = [(2, 3), (0, 1), (1, 1), EMPTY]
    assert topology.replace_(rows, cols, index, 3, 4, torch.arange(4), *pool(new, torch.int64)) == 3
    assert as_lists(index) == brute(new, 3, 4)
    assert topology.replace_(rows, cols, index, 3, 4, torch.arange(4), *pool(new, torch.int64)) == 3
    assert as_lists(index) == brute(new, 3, 4)


# --- large matrices -------------------------------------------------------------------------------


def test_a_million_by_a_million() -> None:
    n, k = 10**6, 10**5
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert topology.index_dtype(n, n, k) is torch.int32
    rows, cols = topology.sample(n, n, k, 1)
    rows, cols = rows.int(), cols.int()
    index = topology.build_index(rows, cols, n, n)
    # the positions use the whole range, beyond what int32 products could tell
    assert int(cols.max()) > n // 2
    for step in range(3):
        slots = torch.randperm(k)[: 10 ** (step + 2)]
        drawn = topology.sample_dormant(
            index, n, n, slots.numel(), rows[slots].long(), cols[slots].long(), 1, step, 1
        )
        assert topology.replace_(rows, cols, index, n, n, slots, *drawn) == k
        order = torch.sort(rows[slots].long(), stable=True).indices
        slots = slots[order]
        new = topology.sample_dormant_in_rows(
            index, n, n, rows[slots].long(), cols[slots].long(), 1, step, 2
        )
        topology.replace_(rows, cols, index, n, n, slots, rows[slots].long(), new)
    fresh = topology.build_index(rows, cols, n, n)
    assert all(torch.equal(a, b) for a, b in zip(index, fresh, strict=True))
    assert torch.unique(rows.long() * n + cols.long()).numel() == k
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1_000_000  # kB; rows x cols bits would be 125 GB


def test_int64_where_int32_does_not_reach() -> None:
    assert topology.index_dtype(2**31, 5, 5) is torch.int64
    assert topology.index_dtype(5, 2**31, 5) is torch.int64
    assert topology.index_dtype(2**31 - 1, 2**31 - 1, 5) is torch.int32


def test_duplicates_are_found_by_position_not_by_a_wrapped_product() -> None:
    # 65536 * 65536 = 2^32: in int32 these two positions would have one key.
    n = 65536 * 2
    index = topology.build_index(*pool([(0, 0), (n // 2, 0), (2**15, 5)]), n, n)
    assert int(index.row_ptr[-1]) == 3


# --- signs and fingerprints -----------------------------------------------------------------------


def test_signs_are_balanced_and_belong_to_positions() -> None:
    side = 400
    rows = torch.arange(side).repeat_interleave(side)
    cols = torch.arange(side).repeat(side)
    signs = topology.position_signs(rows, cols, 3, 5)
    assert signs.dtype == torch.int8
    assert set(signs.tolist()) == {-1, 1}
    for axis in (None, 0, 1):
        total = (
            signs.view(side, side).double().sum()
            if axis is None
            else signs.view(side, side).double().sum(axis)
        )
        n = side * side if axis is None else side
        assert (total / n**0.5).abs().max() < 5
    assert abs(np.corrcoef(signs[:-1], signs[1:])[0, 1]) < 5 / side
    shuffle = torch.randperm(side * side)
    assert torch.equal(topology.position_signs(rows[shuffle], cols[shuffle], 3, 5), signs[shuffle])
    assert torch.equal(topology.position_signs(rows.int(), cols.int(), 3, 5), signs)
    for other in (
        topology.position_signs(rows, cols, 4, 5),
        topology.position_signs(rows, cols, 3, 6),
        topology.position_signs(cols, rows, 3, 5),
    ):
        assert 0.45 < (other == signs).double().mean() < 0.55


def test_signs_of_huge_positions_differ() -> None:
    near = torch.arange(1000)
    base = topology.position_signs(near, near, 1, 1)
    for high in (2**32, 2**40):
        assert not torch.equal(topology.position_signs(near + high, near, 1, 1), base)
        assert not torch.equal(topology.position_signs(near, near + high, 1, 1), base)


def test_fingerprint_is_of_the_set() -> None:
    slots: Slots = [(0, 0), (0, 3), (1, 1), (2, 0), (3, 3)]
    base = topology.fingerprint(*pool(slots))
    assert 0 <= base < 2**63
    assert topology.fingerprint(*pool(slots[::-1])) == base
    assert topology.fingerprint(*pool([EMPTY, *slots, EMPTY])) == base
    assert topology.fingerprint(*pool(slots, torch.int64)) == base
    assert topology.fingerprint(*pool(slots[1:])) != base
    assert topology.fingerprint(*pool([(c, r) for r, c in slots])) != base
    prints = {
        topology.fingerprint(*pool(list(s)))
        for s in itertools.combinations(itertools.product(range(4), range(4)), 3)
    }
    assert len(prints) == 560

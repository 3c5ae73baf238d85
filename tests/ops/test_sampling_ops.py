"""Native sampling without replacement and of dormant positions, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from index_pools import both, pool, pools, same
from rewire import _native, random, topology
from rewire.topology import build_index

pytestmark = pytest.mark.skipif(not _native.available(), reason="the C++ extension is not in use")


@pytest.mark.parametrize(
    ("n", "bound"),
    [
        (0, 0),
        (0, 5),
        (1, 1),
        (5, 5),
        (3, 7),
        (4, 7),
        (16, 10**12),
        (17, 10**12),
        (40, 2**62),
        (1000, 10**6),
        (1000, 2001),
        (1001, 2001),
        (3000, 10**12),
        (50_000, 10**8),
    ],
)
@pytest.mark.parametrize("offset", [0, 7 << 32])
def test_distinct(n, bound, offset):
    native, definition = both(random.distinct, n, bound, 2**63 - 5, 2**32 - 1, 77, offset=offset)
    assert same(native, definition)
    assert native.unique().numel() == n


@settings(max_examples=100, deadline=None)
@given(
    bound=st.integers(0, 300),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
)
def test_distinct_at_every_density(bound, share, seed, step):
    assert same(*both(random.distinct, round(share * bound), bound, seed, step, 3))


def test_distinct_refuses_too_many():
    with pytest.raises(RuntimeError, match="between 0 and bound"):
        torch.ops.rewire.distinct(3, 2, 0, 0, 0, 0)


@pytest.mark.parametrize("scale", [1, 2**33])
def test_position_signs(scale):
    rows = torch.arange(-1, 500) * scale
    assert same(*both(topology.position_signs, rows, rows.flip(0), 2**62 + 9, 4))
    assert (
        same(*both(topology.position_signs, rows[:300].int(), rows[200:].int()[:300], 5, 4))
        or scale > 1
    )


@settings(max_examples=200, deadline=None)
@given(p=pools(), share=st.floats(0, 1), drop=st.floats(0, 1), seed=st.integers(0, 2**63 - 1))
def test_sample_dormant(p, share, drop, seed):
    rows, cols, n_rows, n_cols = p
    index = build_index(rows, cols, n_rows, n_cols)
    active = (rows >= 0).nonzero().flatten()
    dropped = active[: round(drop * active.numel())]
    gone = rows[dropped].long(), cols[dropped].long()
    free = n_rows * n_cols - active.numel() + dropped.numel()
    n = round(share * free)
    native, definition = both(topology.sample_dormant, index, n_rows, n_cols, n, *gone, seed, 5, 6)
    assert same(native, definition)
    assert torch.unique(native[0] * n_cols + native[1]).numel() == n


@settings(max_examples=200, deadline=None)
@given(p=pools(), drop=st.floats(0, 1), seed=st.integers(0, 2**63 - 1))
def test_sample_dormant_in_rows(p, drop, seed):
    rows, cols, n_rows, n_cols = p
    index = build_index(rows, cols, n_rows, n_cols)
    active = (rows >= 0).nonzero().flatten()
    dropped = active[: round(drop * active.numel())]
    dropped = dropped[torch.argsort(rows[dropped], stable=True)]
    gone = rows[dropped].long(), cols[dropped].long()
    assert same(*both(topology.sample_dormant_in_rows, index, n_rows, n_cols, *gone, seed, 5, 6))


def test_bad_dormant_arguments_raise():
    rows, cols = pool(4, 5, 9, 0, 0)
    index = build_index(rows, cols, 4, 5)
    none = torch.empty(0, dtype=torch.int64)
    native = torch.ops.rewire
    with pytest.raises(RuntimeError, match="rank is out of range"):
        native.candidates(index.row_ptr, index.row_cols, 5, torch.tensor([11]), none, none)
    with pytest.raises(RuntimeError, match="cannot draw 12 of 11"):
        native.sample_dormant(index.row_ptr, index.row_cols, 5, 12, none, none, 0, 0, 0)
    for given_rows, message in (([2, 1], "sorted"), ([4], "out of range")):
        given_rows = torch.tensor(given_rows)
        with pytest.raises(RuntimeError, match=message):
            native.sample_dormant_in_rows(
                index.row_ptr, index.row_cols, 5, given_rows, given_rows, 0, 0, 0
            )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("first", "last"), [(1, 9), (-(2**31), 9), (0, -1), (0, 10), (0, 2**31 - 1), (0, -(2**31))]
)
@pytest.mark.parametrize("n_rows", [0, 4])
def test_dormant_ones_of_a_pointer_list_with_wrong_ends(dtype, first, last, n_rows):
    none = torch.empty(0, dtype=torch.int64)
    ptr = (
        build_index(*pool(4, 5, 9, 0, 0, dtype), 4, 5).row_ptr
        if n_rows
        else torch.zeros(1, dtype=dtype)
    )
    ptr[0] = first
    if n_rows or not first:
        ptr[-1] = last
    cols = torch.zeros(9 if n_rows else 0, dtype=dtype)
    native = torch.ops.rewire
    for call in (
        lambda: native.candidates(ptr, cols, 5, torch.arange(2), none, none),
        lambda: native.sample_dormant(ptr, cols, 5, 2, none, none, 0, 0, 0),
        lambda: native.sample_dormant_in_rows(ptr, cols, 5, none, none, 0, 0, 0),
    ):
        with pytest.raises(RuntimeError, match="row_ptr must start at 0 and end at"):
            call()


@pytest.mark.parametrize(("n_rows", "n_cols"), [(0, 5), (5, 0), (0, 0)])
def test_dormant_ones_of_an_empty_matrix(n_rows, n_cols):
    none = torch.empty(0, dtype=torch.int64)
    index = build_index(none, none, n_rows, n_cols)
    assert same(*both(topology.sample_dormant, index, n_rows, n_cols, 0, none, none, 1, 2, 3))
    assert same(*both(topology.sample_dormant, index, n_rows, n_cols, 1, none, none, 1, 2, 3))
    assert same(*both(topology.sample_dormant_in_rows, index, n_rows, n_cols, none, none, 1, 2, 3))
    with pytest.raises(RuntimeError, match="rank is out of range"):
        torch.ops.rewire.candidates(
            index.row_ptr, index.row_cols, n_cols, torch.tensor([0]), none, none
        )

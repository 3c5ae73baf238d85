"""The native twins of rewire.random, rewire.topology and langevin_step_: the same results to the
bit.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from index_pools import both, plain, pool, pools, same
from rewire import _native, topology
from rewire.topology import Index, TopologyError, build_index, replace_

pytestmark = pytest.mark.skipif(not _native.available(), reason="the C++ extension is not in use")


# --- building and changing ------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(p=pools())
def test_build_index(p):
    assert same(*both(build_index, *p))


@settings(max_examples=200, deadline=None)
@given(p=pools(), data=st.data())
def test_build_index_finds_the_same_mistakes(p, data):
    rows, cols, n_rows, n_cols = p
    for _ in range(data.draw(st.integers(0, 3))):
        if rows.numel():
            slot = data.draw(st.integers(0, rows.numel() - 1))
            rows[slot] = data.draw(st.integers(-2, n_rows))
            cols[slot] = data.draw(st.integers(-2, n_cols))
    before = topology.empty_index(n_rows, n_cols, rows.numel(), rows.dtype)
    out = Index(*(t.clone() for t in before))
    native, definition = both(build_index, rows, cols, n_rows, n_cols)
    assert same(native, definition)
    with contextlib.suppress(TopologyError):
        build_index(rows, cols, n_rows, n_cols, out=out)
    assert same(tuple(out), tuple(before if isinstance(native, str) else native))


def check_replace(rows, cols, n_rows, n_cols, slots, new_rows, new_cols):
    results = []
    for context in (contextlib.nullcontext, plain):
        with context():
            r, c = rows.clone(), cols.clone()
            index = build_index(r, c, n_rows, n_cols)
            try:
                k = replace_(r, c, index, n_rows, n_cols, slots, new_rows, new_cols)
            except TopologyError as error:
                k = str(error)
            results.append((k, r, c, *index))
    assert same(*results)
    return results[0][0]


@settings(max_examples=400, deadline=None)
@given(p=pools(), data=st.data())
def test_replace(p, data):
    """Moves, swaps, additions, removals and mistakes of every kind, few and many."""
    rows, cols, n_rows, n_cols = p
    capacity = rows.numel()
    if not capacity:
        return
    n = data.draw(st.integers(0, min(capacity, 12)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    slots = torch.randperm(capacity, generator=generator)[:n]
    free = torch.ones(n_rows * n_cols, dtype=torch.bool)
    kept = torch.ones(capacity, dtype=torch.bool)
    kept[slots] = False
    kept &= rows >= 0
    free[rows[kept].long() * n_cols + cols[kept]] = False
    keys = free.nonzero().flatten()
    keys = keys[torch.randperm(keys.numel(), generator=generator)[:n]]
    keys = torch.cat([keys, torch.full((n - keys.numel(),), -1)])
    keys[torch.rand(n, generator=generator) < 0.2] = -1
    new_rows, new_cols = (
        torch.where(keys < 0, -1, keys // n_cols),
        torch.where(keys < 0, -1, keys % n_cols),
    )
    if n and data.draw(st.booleans()):
        place = data.draw(st.integers(0, n - 1))
        new_rows[place] = data.draw(st.integers(-2, n_rows))
        new_cols[place] = data.draw(st.integers(-2, n_cols))
        if data.draw(st.booleans()):
            slots[place] = data.draw(st.integers(-1, capacity))
    check_replace(rows, cols, n_rows, n_cols, slots, new_rows, new_cols)


@pytest.mark.parametrize("changes", [1, 40, 700, 4000, 12_000, 40_000])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_replace_in_a_large_pool(changes, dtype):
    """The merge in place (on two threads), and what weaves new lists when many change."""
    n_rows, n_cols = 300, 500
    rows, cols = pool(n_rows, n_cols, 40_000, 100, 1, dtype)
    generator = torch.Generator().manual_seed(2)
    slots = torch.randperm(rows.numel(), generator=generator)[:changes]
    taken = torch.zeros(n_rows * n_cols, dtype=torch.bool)
    taken[rows[rows >= 0].long() * n_cols + cols[rows >= 0]] = True
    keys = (~taken).nonzero().flatten()
    keys = keys[torch.randperm(keys.numel(), generator=generator)[:changes]]
    keys[::7] = -1
    new_rows, new_cols = (
        torch.where(keys < 0, -1, keys // n_cols),
        torch.where(keys < 0, -1, keys % n_cols),
    )
    assert isinstance(check_replace(rows, cols, n_rows, n_cols, slots, new_rows, new_cols), int)


@settings(max_examples=150, deadline=None)
@given(p=pools(), data=st.data())
def test_a_damaged_index_never_crashes_replace(p, data):
    """Whatever is in the lists: either an error, or a pool that is right."""
    rows, cols, n_rows, n_cols = p
    if rows.numel() < 9:
        return
    index = build_index(rows, cols, n_rows, n_cols)
    for _ in range(data.draw(st.integers(1, 3))):
        target = data.draw(st.sampled_from((*index, rows, cols)))
        target[data.draw(st.integers(0, target.numel() - 1))] = data.draw(
            st.integers(-(2**31), 2**31 - 1)
        )
    slots = torch.randperm(rows.numel())[: data.draw(st.sampled_from((3, rows.numel())))]
    minus = torch.full((slots.numel(),), -1)
    with contextlib.suppress(TopologyError, RuntimeError):
        replace_(rows, cols, index, n_rows, n_cols, slots, minus, minus)
    with contextlib.suppress(TopologyError, RuntimeError):
        torch.ops.rewire.candidates(
            index.row_ptr, index.row_cols, n_cols, torch.arange(3), minus[:3], minus[:3]
        )


@settings(max_examples=150, deadline=None)
@given(p=pools(), data=st.data())
def test_many_changes_of_a_damaged_index(p, data):
    """Half of the connections move; the pool is right whatever was in the lists."""
    rows, cols, n_rows, n_cols = p
    capacity = rows.numel()
    if capacity < 20:
        return
    index = build_index(rows, cols, n_rows, n_cols)
    target = data.draw(st.sampled_from(tuple(index)))
    target[data.draw(st.integers(0, target.numel() - 1))] = data.draw(
        st.integers(-(2**31), 2**31 - 1)
    )
    slots = torch.randperm(capacity)[: capacity // 2]
    new_rows, new_cols = rows[slots].flip(0), cols[slots].flip(0)
    expected = rows.clone(), cols.clone()
    expected[0][slots], expected[1][slots] = new_rows, new_cols
    replace_(rows, cols, index, n_rows, n_cols, slots, new_rows, new_cols)
    assert same((rows, cols), expected)


def test_pointers_whose_differences_overflow():
    """Each difference is a fair number of connections again once it has wrapped around."""
    keys = torch.arange(0, 60, 2)
    rows, cols = keys // 10, keys % 10
    index = build_index(rows, cols, 6, 10)
    index.row_ptr[1:] = torch.tensor([5, -(2**63), -10, 6, 7, 30])
    slots = torch.arange(20)
    assert replace_(rows, cols, index, 6, 10, slots, rows[slots], cols[slots] + 1) == 30
    assert same(index, build_index(rows, cols, 6, 10))


def test_a_duplicate_that_only_one_list_shows():
    """What has been woven by row by then is taken back, with the damage that hid it."""
    keys = torch.arange(0, 160, 4)
    rows, cols = keys // 20, keys % 20
    index, before = build_index(rows, cols, 8, 20), (rows.clone(), cols.clone())
    index.row_cols[1] = 5  # of (0, 4)
    slots = torch.arange(20, 40)
    new_rows, new_cols = rows[slots].clone(), cols[slots] + 1
    new_rows[0], new_cols[0] = 0, 4
    with pytest.raises(TopologyError, match=r"\(0, 4\) occurs more than once"):
        replace_(rows, cols, index, 8, 20, slots, new_rows, new_cols)
    assert same((rows, cols), before)
    assert same(index, build_index(rows, cols, 8, 20))


def everything(dtype=torch.int64, fan_in=64):
    """One row with 64 connections in a pool of its own, and its index."""
    rows, cols = torch.zeros(fan_in, dtype=dtype), torch.arange(fan_in, dtype=dtype)
    return rows, cols, build_index(rows, cols, 1, 5000)


@pytest.mark.parametrize("where", ["row_cols", "row_slots", "col_slots", "cols", "row_ptr"])
@pytest.mark.parametrize("changes", [1, 40])  # few, many
@pytest.mark.parametrize("context", [contextlib.nullcontext, plain])
def test_slots_may_be_a_view_of_what_replace_changes(where, changes, context):
    with context():
        rows, cols, index = everything()
        slots = {**index._asdict(), "cols": cols}[where][: 1 if where == "row_ptr" else changes]
        changed = slots.clone()
        new_cols = 4999 - torch.arange(slots.numel())
        expected = cols.clone()
        expected[changed] = new_cols
        replace_(rows, cols, index, 1, 5000, slots, torch.zeros_like(new_cols), new_cols)
        assert torch.equal(cols, expected)
        assert same(tuple(index), tuple(build_index(rows, cols, 1, 5000)))


@pytest.mark.parametrize("changes", [8, 40])
@pytest.mark.parametrize("where", ["pool", "by_row", "by_col"])
@pytest.mark.parametrize("context", [contextlib.nullcontext, plain])
def test_new_positions_may_be_a_view_of_what_replace_changes(changes, where, context):
    """The first connections in the opposite order."""
    with context():
        rows, cols, index = everything()
        views = {
            "pool": (rows, cols),
            "by_row": (rows, index.row_cols),
            "by_col": (index.col_rows, index.col_slots),
        }
        new_rows, new_cols = (t[:changes] for t in views[where])
        slots = torch.arange(changes).flip(0)
        expected = torch.cat((slots, torch.arange(changes, 64)))
        assert replace_(rows, cols, index, 1, 5000, slots, new_rows, new_cols) == 64
        assert torch.equal(cols, expected)
        assert same(tuple(index), tuple(build_index(rows, cols, 1, 5000)))


def test_slots_that_a_merge_overwrites_with_columns_far_beyond_the_pool():
    rows, cols = torch.zeros(64, dtype=torch.int64), torch.arange(64)
    index = build_index(rows, cols, 1, 10**7)
    slots = index.row_cols[63:]
    new = torch.tensor([10**7 - 1])
    assert torch.ops.rewire.replace_(
        rows, cols, *index, 1, 10**7, slots, torch.tensor([0]), new
    ) == (0, 0, 0)
    assert cols.tolist() == [*range(63), 10**7 - 1]
    assert same(tuple(index), tuple(build_index(rows, cols, 1, 10**7)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("context", [contextlib.nullcontext, plain])
@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(range(8), 2)))
def test_a_pool_in_shared_memory_is_refused(a, b, context, dtype):
    """n_rows = n_cols = 63, so that all of the eight are equally long."""
    rows, cols = torch.arange(64, dtype=dtype).clamp(max=62), torch.zeros(64, dtype=dtype)
    cols[63] = 1
    with context():
        tensors = [rows, cols, *build_index(rows, cols, 63, 63)]
        memory = torch.cat((tensors[a], tensors[b][1:]))  # overlapping in one entry
        tensors[a], tensors[b] = memory[:64], memory[63:]
        before = [t.clone() for t in tensors]
        one = torch.tensor([0])
        with pytest.raises(RuntimeError, match="must not share memory"):
            replace_(tensors[0], tensors[1], Index(*tensors[2:]), 63, 63, one, one, one)
        if b >= 2:
            with pytest.raises(RuntimeError, match="must not share memory"):
                build_index(tensors[0], tensors[1], 63, 63, out=Index(*tensors[2:]))
        assert same(tuple(tensors), tuple(before))


@pytest.mark.parametrize("context", [contextlib.nullcontext, plain])
def test_lists_side_by_side_and_a_diagonal_are_fine(context):
    with context():
        memory = torch.zeros(8 * 5, dtype=torch.int64)
        rows, cols, *lists = memory.split(5)
        rows.copy_(torch.tensor([3, 2, 1, 0, -1]))
        cols.copy_(rows)
        index = build_index(rows, cols, 4, 4, out=Index(*lists))
        assert same(tuple(index), tuple(build_index(rows, rows, 4, 4)))
        new = torch.tensor([0])
        assert replace_(rows, cols, index, 4, 4, torch.tensor([4]), new, new + 1) == 5
        assert same(tuple(index), tuple(build_index(rows, cols, 4, 4)))
        # the second and third column in strides, so copied when read
        wide = torch.stack((rows, cols, cols), 1)
        with pytest.raises(RuntimeError, match="must not share memory"):
            build_index(
                wide[:, 0], wide[:, 1], 4, 4, out=index._replace(row_ptr=wide.view(-1)[2:7])
            )


def test_a_pool_that_was_changed_while_it_was_read():
    """A column list that is also the list of slots: 200000 writes into memory that was read as
    checked.
    """
    n = 200_000
    rows, cols = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    index = topology.empty_index(n, 1, n, torch.int64)._replace(row_slots=cols)
    with pytest.raises(RuntimeError, match="must not share memory"):
        build_index(rows, cols, n, 1, out=index)
    assert not cols.any()


def test_int32_reaches_as_far_as_index_dtype_says():
    """Seen by which complaint comes first: lists for 2**31 - 1 rows would take 8 GiB."""
    none = torch.zeros(0, dtype=torch.int32)
    lists = topology.empty_index(1, 1, 0, torch.int32)
    for size in ((2**31 - 1, 5), (5, 2**31 - 1), (2**31, 5), (5, 2**31)):
        fits = topology.index_dtype(*size, 0) is torch.int32
        with pytest.raises(
            RuntimeError, match="one entry more" if fits else "do not fit the dtype"
        ):
            torch.ops.rewire.build_index_(none, none, *size, *lists)

"""The native twins of rewire.random, rewire.topology and langevin_step_: the same results to the bit."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewire import _native, random, topology
from rewire.ops import langevin_step_
from rewire.topology import Index, TopologyError, build_index, replace_

pytestmark = pytest.mark.skipif(not _native.available(), reason="the C++ extension is not in use")


@contextlib.contextmanager
def plain():
    """Within, the plain PyTorch definitions run."""
    native, _native.available = _native.available, lambda *_: False
    try:
        yield
    finally:
        _native.available = native


def both(function, *args, **kwargs):
    """Result of the native function and of the definition; errors (with their words) count as results."""
    results = []
    for context in (contextlib.nullcontext, plain):
        with context():
            try:
                results.append(function(*args, **kwargs))
            except TopologyError as error:
                results.append(str(error))
    return results


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def pool(n_rows, n_cols, connections, spare, seed, dtype=torch.int32):
    """rows and cols of a random pool whose connections are in random slots."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(n_rows * n_cols, generator=generator)[:connections]
    rows, cols = (torch.full((connections + spare,), -1, dtype=dtype) for _ in range(2))
    slots = torch.randperm(connections + spare, generator=generator)[:connections]
    rows[slots], cols[slots] = (keys // n_cols).to(dtype), (keys % n_cols).to(dtype)
    return rows, cols


@st.composite
def pools(draw, least=1):
    n_rows, n_cols = draw(st.integers(1, 12)), draw(st.integers(least, 12))
    connections = draw(st.integers(0, n_rows * n_cols))
    dtype = draw(st.sampled_from((torch.int32, torch.int64)))
    rows, cols = pool(n_rows, n_cols, connections, draw(st.integers(0, 4)), draw(st.integers(0, 999)), dtype)
    return rows, cols, n_rows, n_cols


# --- random numbers ---------------------------------------------------------------------------------------------------


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
@given(bound=st.integers(0, 300), share=st.floats(0, 1), seed=st.integers(0, 2**63 - 1), step=st.integers(0, 2**32 - 1))
def test_distinct_at_every_density(bound, share, seed, step):
    assert same(*both(random.distinct, round(share * bound), bound, seed, step, 3))


def test_distinct_refuses_too_many():
    with pytest.raises(RuntimeError, match="between 0 and bound"):
        torch.ops.rewire.distinct(3, 2, 0, 0, 0, 0)


@pytest.mark.parametrize("scale", [1, 2**33])
def test_position_signs(scale):
    rows = torch.arange(-1, 500) * scale
    assert same(*both(topology.position_signs, rows, rows.flip(0), 2**62 + 9, 4))
    assert same(*both(topology.position_signs, rows[:300].int(), rows[200:].int()[:300], 5, 4)) or scale > 1


# --- building and changing --------------------------------------------------------------------------------------------


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
    new_rows, new_cols = torch.where(keys < 0, -1, keys // n_cols), torch.where(keys < 0, -1, keys % n_cols)
    if n and data.draw(st.booleans()):
        place = data.draw(st.integers(0, n - 1))
        new_rows[place] = data.draw(st.integers(-2, n_rows))
        new_cols[place] = data.draw(st.integers(-2, n_cols))
        if data.draw(st.booleans()):
            slots[place] = data.draw(st.integers(-1, capacity))
    check_replace(rows, cols, n_rows, n_cols, slots, new_rows, new_cols)


@pytest.mark.parametrize("changes", [1, 40, 700, 4000])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_replace_in_a_large_pool(changes, dtype):
    """The streaming merge (on two threads) and the rebuild."""
    n_rows, n_cols = 300, 500
    rows, cols = pool(n_rows, n_cols, 40_000, 100, 1, dtype)
    generator = torch.Generator().manual_seed(2)
    slots = torch.randperm(rows.numel(), generator=generator)[:changes]
    taken = torch.zeros(n_rows * n_cols, dtype=torch.bool)
    taken[rows[rows >= 0].long() * n_cols + cols[rows >= 0]] = True
    keys = (~taken).nonzero().flatten()
    keys = keys[torch.randperm(keys.numel(), generator=generator)[:changes]]
    keys[::7] = -1
    new_rows, new_cols = torch.where(keys < 0, -1, keys // n_cols), torch.where(keys < 0, -1, keys % n_cols)
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
        target[data.draw(st.integers(0, target.numel() - 1))] = data.draw(st.integers(-(2**31), 2**31 - 1))
    slots = torch.randperm(rows.numel())[:3]
    minus = torch.full((3,), -1)
    with contextlib.suppress(TopologyError, RuntimeError):
        replace_(rows, cols, index, n_rows, n_cols, slots, minus, minus)
    with contextlib.suppress(TopologyError, RuntimeError):
        torch.ops.rewire.candidates(index.row_ptr, index.row_cols, n_cols, torch.arange(3), minus, minus)


# --- dormant connections ----------------------------------------------------------------------------------------------


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
            native.sample_dormant_in_rows(index.row_ptr, index.row_cols, 5, given_rows, given_rows, 0, 0, 0)


# --- the random walk --------------------------------------------------------------------------------------------------


def walk(n, dtype, noise, shrink=0.01, index_dtype=torch.int32):
    generator = torch.Generator().manual_seed(n)
    signs = (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).to(torch.int8)
    values = signs * torch.rand(n, dtype=dtype, generator=generator)
    rows = torch.randint(-1, 9, (n,), generator=generator).to(index_dtype)
    values[rows < 0] = 0
    arguments = (rows, signs, shrink, noise, 11, 12, 13)
    results = []
    for context in (contextlib.nullcontext, plain):
        with context():
            v = values.clone()
            results.append((v, langevin_step_(v, *arguments)))
    return results


@pytest.mark.parametrize("n", [0, 1, 3, 63, 64, 65, 127, 128, 129, 1000, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_langevin_without_noise_is_exact(n, dtype, index_dtype):
    native, definition = walk(n, dtype, 0.0, index_dtype=index_dtype)
    assert same(native, definition)


@pytest.mark.parametrize("n", [1, 3, 64, 129, 1000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_langevin_noise(n, dtype):
    (values, dropped), (expected, expected_dropped) = walk(n, dtype, 1.0, shrink=0.0)
    # A number within rounding of zero may fall on either side of it.
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=2e-6)
    apart = set(dropped.tolist()) ^ set(expected_dropped.tolist())
    assert all(abs(float(expected[k])) < 2e-6 for k in apart)
    assert torch.equal(dropped, dropped.sort().values)


def test_normals_agree_over_many_draws():
    n = 1 << 20
    values = torch.full((n,), 100.0, dtype=torch.float64)
    ones = torch.ones(n, dtype=torch.int8)
    langevin_step_(values, ones.int(), ones, 0.0, 1.0, 3, 4, 5)
    worst = (values - 100.0 - random.normal(3, 4, 5, n).double()).abs().max()
    assert worst < 1e-6


def test_langevin_is_the_same_on_any_number_of_threads():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(walk(100_001, torch.float32, 0.5)[0])
    finally:
        torch.set_num_threads(before)
    assert all(same(results[0], r) for r in results[1:])


def test_langevin_refuses_what_it_cannot_read():
    values, rows, signs = torch.zeros(4), torch.zeros(4, dtype=torch.int32), torch.ones(4, dtype=torch.int8)
    step = torch.ops.rewire.langevin_step_
    for arguments, message in (
        ((values, rows[:3], signs), "same length"),
        ((values, rows, signs.int()), "int8"),
        ((torch.zeros(8)[::2], rows, signs), "contiguous"),
        ((values.half(), rows, signs), "float32 or float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            step(*arguments, 0.0, 0.0, 0, 0, 0)

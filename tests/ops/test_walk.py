"""walk_and_regrow_ against the two steps that it is made of; merging and searching in long lists,
by every kernel.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interpreter import run_python
from merging import check_candidates, check_merges
from problems import same
from rewire import _native
from rewire.nn import SparseWeight
from rewire.nn.weight.walk import walk
from rewire.ops import langevin_step_, regrow_, walk_and_regrow_
from rewire.topology import build_index

needs_native = pytest.mark.skipif(
    not _native.available("walk_and_regrow_"), reason="the C++ extension is not in use"
)
STREAMS = {"grow_stream": 9, "sign_stream": 11}


def pool(
    shape: tuple[int, int],
    connections: int,
    spare: int,
    seed: int,
    dtype: torch.dtype,
    kind: torch.dtype,
):
    """values (some across zero), signs, rows, cols and gradient of a pool whose connections are in
    random slots.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(shape[0] * shape[1], generator=generator)[:connections]
    occupied = torch.randperm(connections + spare, generator=generator)[:connections]
    rows, cols = (torch.full((connections + spare,), -1, dtype=kind) for _ in range(2))
    rows[occupied], cols[occupied] = (keys // shape[1]).to(kind), (keys % shape[1]).to(kind)
    values = torch.zeros(connections + spare, dtype=dtype)
    values[occupied] = torch.randn(connections, dtype=dtype, generator=generator)
    signs = 1 - 2 * torch.signbit(values).to(torch.int8)
    flipped = torch.rand(signs.numel(), generator=generator) < 0.1
    return values, torch.where(flipped, -signs, signs), rows, cols, torch.ones_like(values)


def walked(
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
    parts,
    shape,
    noise: float,
    at: dict[str, int],
    fixed: bool,
):
    """The slots, and everything afterwards."""
    values, signs, rows, cols, gradient = (t.clone() for t in parts)
    index = build_index(rows, cols, *shape)
    with monkeypatch.context() as patch:
        if not native:
            patch.setattr(_native, "available", lambda *_: False)
        slots = walk_and_regrow_(
            values,
            signs,
            rows,
            cols,
            index,
            gradient,
            0.05,
            noise,
            fixed=fixed,
            noise_stream=5,
            **at,
            **STREAMS,
        )
    return slots, values, signs, rows, cols, gradient, *index


def in_parts(parts, shape, noise: float, at: dict[str, int], fixed: bool):
    """The same by the two native steps."""
    values, signs, rows, cols, gradient = (t.clone() for t in parts)
    index = build_index(rows, cols, *shape)
    slots = langevin_step_(values, rows, signs, 0.05, noise, at["seed"], at["step"], 5)
    if slots.numel():
        regrow_(values, signs, rows, cols, index, slots, fixed=fixed, **at, **STREAMS)
        gradient[slots] = 0
    return slots, values, signs, rows, cols, gradient, *index


@needs_native
@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    share=st.floats(0, 1),
    spare=st.integers(0, 3),
    at=st.fixed_dictionaries(
        {"seed": st.integers(0, 2**63 - 1), "step": st.integers(0, 2**32 - 1)}
    ),
    fixed=st.booleans(),
    dtypes=st.tuples(
        st.sampled_from((torch.float32, torch.float64)), st.sampled_from((torch.int32, torch.int64))
    ),
)
def test_native_is_the_definition(shape, share, spare, at, fixed, dtypes) -> None:
    parts = pool(shape, round(share * shape[0] * shape[1]), spare, at["seed"] % 1000, *dtypes)
    with pytest.MonkeyPatch.context() as patch:
        native, plain = (walked(n, patch, parts, shape, 0.0, at, fixed) for n in (True, False))
    assert all(same(x, y) for x, y in zip(native, plain, strict=True))


@needs_native
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("spare", [0, 50])
def test_in_a_large_pool_on_any_number_of_threads(
    noise: float, spare: int, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, at = (700, 900), {"seed": 77, "step": 5}
    parts = pool(shape, 60_000, spare, 3, torch.float32, torch.int32)
    expected = in_parts(parts, shape, noise, at, fixed)
    assert 1000 < expected[0].numel() < 20_000
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got = walked(True, monkeypatch, parts, shape, noise, at, fixed)
            assert all(same(x, y) for x, y in zip(got, expected, strict=True))
    finally:
        torch.set_num_threads(before)
    fresh = build_index(expected[3], expected[4], *shape)
    assert all(torch.equal(x, y) for x, y in zip(expected[6:], fresh, strict=True))


@needs_native
@pytest.mark.parametrize("share", [0.0, 0.002, 0.02])
def test_merges_few_changes_of_a_large_pool(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that the lists are merged and not built anew, which they are compared to."""
    shape, at = (500, 800), {"seed": 7, "step": 8}
    _, _, rows, cols, gradient = pool(shape, 50_000, 0, 3, torch.float32, torch.int32)
    values = torch.ones(50_000)
    values[
        torch.randperm(50_000, generator=torch.Generator().manual_seed(1))[: round(share * 50_000)]
    ] = -1.0
    parts = (values, torch.ones(50_000, dtype=torch.int8), rows, cols, gradient)
    slots, *after = walked(True, monkeypatch, parts, shape, 0.0, at, True)
    assert torch.equal(slots, (values < 0).nonzero().flatten())
    assert torch.equal(after[4], torch.where(values < 0, 0.0, 1.0))
    fresh = build_index(after[2], after[3], *shape)
    assert all(torch.equal(x, y) for x, y in zip(after[5:], fresh, strict=True))


@needs_native
@pytest.mark.parametrize("where", ["row_slots", "col_slots", "col_rows", "col_ptr"])
def test_a_damaged_list_is_mended(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists are derived: where a merge finds that they are not the pool's, they are derived
    anew.
    """
    shape = (30, 400)
    values, signs, rows, cols, _ = pool(shape, 3000, 0, 3, torch.float32, torch.int32)
    index = build_index(rows, cols, *shape)
    damaged = index._asdict()[where]
    damaged[damaged.numel() // 2 :] = 0
    slots = torch.arange(0, 3000, 30)
    assert (
        regrow_(values, signs, rows, cols, index, slots, seed=1, step=2, fixed=True, **STREAMS)
        == 3000
    )
    assert all(
        torch.equal(x, y) for x, y in zip(index, build_index(rows, cols, *shape), strict=True)
    )


@needs_native
@settings(max_examples=100, deadline=None)
@given(
    shape=st.sampled_from(((1, 600), (20, 40), (300, 5))), seed=st.integers(0, 999), data=st.data()
)
def test_a_damaged_pool_never_crashes(shape, seed, data) -> None:
    parts = pool(shape, round(0.6 * shape[0] * shape[1]), 0, seed, torch.float32, torch.int32)
    values, signs, rows, cols, gradient = parts
    index = build_index(rows, cols, *shape)
    for _ in range(data.draw(st.integers(1, 3))):
        target = data.draw(st.sampled_from((*index, rows, cols)))
        target[data.draw(st.integers(0, target.numel() - 1))] = data.draw(
            st.integers(-(2**31), 2**31 - 1)
        )
    try:
        at = {"seed": seed, "step": 1, "noise_stream": 5, **STREAMS}
        walk_and_regrow_(values, signs, rows, cols, index, gradient, 0.05, 0.0, fixed=True, **at)
    except (ValueError, RuntimeError):
        return
    assert signs.abs().eq(1).all()


@needs_native
def test_memory_of_others_is_refused() -> None:
    values, signs, rows, cols, gradient = pool((5, 6), 20, 0, 1, torch.float32, torch.int32)
    index = build_index(rows, cols, 5, 6)
    call = torch.ops.rewire.walk_and_regrow_
    rest = (0.1, 0.0, 1, 2, 3, 4, 5, True)
    with pytest.raises(RuntimeError, match="as long as rows"):
        call(values, signs, rows, cols, *index, gradient[:5], *rest)
    with pytest.raises(RuntimeError, match="one dtype"):
        call(values, signs, rows, cols, *index, gradient.double(), *rest)
    with pytest.raises(RuntimeError, match="int8"):
        call(values, signs.int(), rows, cols, *index, None, *rest)


def test_gradients_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """None, and one that the native step does not take."""
    shape, at = (20, 30), {"seed": 7, "step": 8}
    values, signs, rows, cols, _ = pool(shape, 200, 5, 3, torch.float32, torch.int32)
    strided = torch.ones(410)[::2]
    results = []
    for gradient in (None, torch.ones(205), strided):
        parts = [t.clone() for t in (values, signs, rows, cols)]
        index = build_index(parts[2], parts[3], *shape)
        slots = walk_and_regrow_(
            *parts, index, gradient, 0.05, 0.0, noise_stream=5, fixed=True, **at, **STREAMS
        )
        results.append((slots, *parts, *index))
        if gradient is not None:
            assert torch.equal((gradient == 0).nonzero().flatten(), slots)
    assert slots.numel()
    assert all(same(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def test_a_pool_walks_as_its_parts_do() -> None:
    """`SparseWeight.walk`: values, topology, gradient, versions, event; without changes, only the
    values' version.
    """
    weight = SparseWeight((30, 40), 200, generator=torch.Generator().manual_seed(4))
    seen = []
    weight.follow(seen.append)
    weight.values.grad = torch.ones(200)
    drawn = {"seed": 6, "step": 7, "noise_stream": 5, "fixed": True, **STREAMS}
    signs = torch.ones(200, dtype=torch.int8)
    with torch.no_grad():
        weight.values.fill_(1.0)
        versions = [t._version for t in (weight.values, weight.rows, *weight.index)]
        assert not walk(weight, signs, 0.5, 0.0, **drawn).numel()
        assert [t._version for t in (weight.values, weight.rows, *weight.index)] == [
            versions[0] + 1,
            *versions[1:],
        ]
        assert not seen
        weight.values[::9] = -1.0
        slots = walk(weight, signs, 0.25, 0.0, **drawn)
    assert torch.equal(slots, torch.arange(0, 200, 9))
    assert all(
        t._version > v
        for t, v in zip((weight.values, weight.rows, *weight.index), versions, strict=True)
    )
    assert torch.equal(weight.values.grad == 0, weight.values.detach() == 0)
    assert torch.equal((weight.values.detach() == 0).nonzero().flatten(), slots)
    assert len(seen) == 1
    assert seen[0].weight is weight
    assert torch.equal(seen[0].slots, slots)
    fresh = build_index(weight.rows, weight.cols, 30, 40)
    assert all(torch.equal(a, b) for a, b in zip(weight.index, fresh, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_long_lists(seed: int) -> None:
    assert check_merges(seed) > 100
    check_candidates(seed)


AGREE = """
import torch
from merging import check_candidates, check_merges
from rewire import _native, random, topology
print(_native.instruction_set())
check_merges(5)
check_candidates(5)
native = [random.distinct(n, 10**9, 3, 4, 5) for n in (17, 31, 33, 1000, 40_000)]
rows = torch.arange(-1, 999) * 2**31
native.append(topology.position_signs(rows, rows.flip(0), 2**62 + 9, 4))
ones = torch.ones(3000, dtype=torch.int8)
values = torch.full((3000,), 9.0)
assert not torch.ops.rewire.langevin_step_(values, ones.int(), ones, 0.0, 1.0, 3, 4, 5).numel()
torch.testing.assert_close(values, 9.0 + random.normal(3, 4, 5, 3000), rtol=0, atol=2e-6)
_native.available = lambda *_: False
plain = [random.distinct(n, 10**9, 3, 4, 5) for n in (17, 31, 33, 1000, 40_000)]
plain.append(topology.position_signs(rows, rows.flip(0), 2**62 + 9, 4))
assert all(torch.equal(a, b) for a, b in zip(native, plain, strict=True))
"""


@needs_native
@pytest.mark.parametrize("cap", ["portable", "avx2", "avx512"])
def test_instruction_sets_agree(cap: str) -> None:
    done = run_python(AGREE, REWIRE_CPU_CAPABILITY=cap)
    assert done.returncode == 0, done.stderr
    order = ("portable", "avx2", "avx512")
    assert order.index(done.stdout.strip()) <= order.index(cap)

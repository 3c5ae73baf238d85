"""regrow_: the native pass equals its definition to the bit, and both equal the parts it is made
of.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from problems import same
from rewire import _native, topology
from rewire.nn import SparseWeight
from rewire.nn.weight.walk import regrow
from rewire.ops import regrow_
from rewire.topology import TopologyError, build_index

needs_native = pytest.mark.skipif(
    not _native.available("regrow_"), reason="the C++ extension is not in use"
)
STREAMS = {"grow_stream": 9, "sign_stream": 11}


def pool(
    n_rows: int,
    n_cols: int,
    connections: int,
    spare: int,
    seed: int,
    dtype: torch.dtype,
    kind: torch.dtype,
):
    """values, signs, rows, cols of a random pool whose connections are in random slots; and the
    occupied slots.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(n_rows * n_cols, generator=generator)[:connections]
    occupied = torch.randperm(connections + spare, generator=generator)[:connections]
    rows, cols = (torch.full((connections + spare,), -1, dtype=kind) for _ in range(2))
    rows[occupied], cols[occupied] = (keys // n_cols).to(kind), (keys % n_cols).to(kind)
    values = torch.zeros(connections + spare, dtype=dtype)
    values[occupied] = torch.randn(connections, dtype=dtype, generator=generator)
    return values, (1 - 2 * torch.signbit(values).to(torch.int8)), rows, cols, occupied


def regrown(native: bool, monkeypatch: pytest.MonkeyPatch, parts, shape, slots, seed, step, fixed):
    """Everything after the change, and what was returned or raised."""
    values, signs, rows, cols, _ = (t.clone() for t in parts)
    index = build_index(rows, cols, *shape)
    with monkeypatch.context() as patch:
        if not native:
            patch.setattr(_native, "available", lambda *_: False)
        try:
            outcome = regrow_(
                values,
                signs,
                rows,
                cols,
                index,
                slots,
                seed=seed,
                step=step,
                fixed=fixed,
                **STREAMS,
            )
        except TopologyError as error:
            outcome = str(error)
    return outcome, (values, signs, rows, cols, *index)


@needs_native
@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    share=st.floats(0, 1),
    drop=st.floats(0, 1),
    spare=st.integers(0, 3),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    fixed=st.booleans(),
    dtypes=st.tuples(
        st.sampled_from((torch.float32, torch.float64)), st.sampled_from((torch.int32, torch.int64))
    ),
)
def test_native_is_the_definition(shape, share, drop, spare, seed, step, fixed, dtypes) -> None:
    k = round(share * shape[0] * shape[1])
    parts = pool(*shape, k, spare, seed % 1000, *dtypes)
    slots = parts[-1][: round(drop * k)]
    with pytest.MonkeyPatch.context() as patch:
        (a, native), (b, plain) = (
            regrown(n, patch, parts, shape, slots, seed, step, fixed) for n in (True, False)
        )
    assert a == b == k
    assert all(same(x, y) for x, y in zip(native, plain, strict=True))


@needs_native
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("changes", [1, 16, 17, 300, 2000, 9000])
def test_in_a_large_pool_on_any_number_of_threads(
    changes: int, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (700, 900)
    parts = pool(*shape, 60_000, 50, 3, torch.float32, torch.int32)
    slots = parts[-1][:changes].sort().values
    before = torch.get_num_threads()
    results = []
    try:
        for native, threads in ((True, 1), (True, 2), (False, 1)):
            torch.set_num_threads(threads)
            results.append(regrown(native, monkeypatch, parts, shape, slots, 77, 5, fixed))
    finally:
        torch.set_num_threads(before)
    for outcome, tensors in results:
        assert outcome == 60_000
        assert all(same(x, y) for x, y in zip(tensors, results[0][1], strict=True))


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("slots", [[0, 0], [3, 99], [-1, 4]])
def test_bad_slots_are_refused_and_change_nothing(
    slots: list[int], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = pool(5, 6, 20, 0, 1, torch.float32, torch.int32)
    index = build_index(parts[2], parts[3], 5, 6)
    outcome, after = regrown(native, monkeypatch, parts, (5, 6), torch.tensor(slots), 1, 2, True)
    assert "out of range or given twice" in str(outcome)
    assert all(torch.equal(x, y) for x, y in zip(after, (*parts[:-1], *index), strict=True))


@needs_native
def test_memory_of_others_is_refused() -> None:
    values, signs, rows, cols, _ = pool(5, 6, 20, 0, 1, torch.float32, torch.int32)
    index = build_index(rows, cols, 5, 6)
    slots = torch.tensor([1])
    for short in (values[:5], values.half()):
        with pytest.raises(RuntimeError):
            torch.ops.rewire.regrow_(short, signs, rows, cols, *index, slots, 1, 2, 3, 4, True)
    with pytest.raises(RuntimeError, match="int8"):
        torch.ops.rewire.regrow_(values, signs.int(), rows, cols, *index, slots, 1, 2, 3, 4, True)


def test_a_pool_regrows_as_it_rewires() -> None:
    """`SparseWeight.regrow` against `rewire` with the same draw: values, topology, gradient and the
    event.
    """
    one, two = (
        SparseWeight((30, 40), 200, generator=torch.Generator().manual_seed(4)) for _ in range(2)
    )
    seen = []
    for weight in (one, two):
        with torch.no_grad():
            weight.values.copy_(torch.randn(200, generator=torch.Generator().manual_seed(5)))
        weight.values.grad = torch.ones(200)
        weight.follow(seen.append)
    slots, signs = torch.arange(0, 200, 9), torch.ones(200, dtype=torch.int8)
    versions = [t._version for t in (one.values, one.rows, *one.index)]
    with torch.no_grad():
        regrow(one, slots, signs, seed=6, step=7, fixed=True, **STREAMS)
    old = two.rows[slots].long(), two.cols[slots].long()
    rows, cols = topology.sample_dormant(
        two.index, 30, 40, slots.numel(), *old, 6, 7, STREAMS["grow_stream"]
    )
    sign = topology.position_signs(rows, cols, 6, STREAMS["sign_stream"])
    two.rewire(slots, rows, cols, torch.zeros(()).copysign(sign))
    assert all(
        t._version > v for t, v in zip((one.values, one.rows, *one.index), versions, strict=True)
    )
    assert same(one.values.detach(), two.values.detach())
    assert torch.equal(one.values.grad, two.values.grad)
    assert all(
        torch.equal(a, b)
        for a, b in zip((one.rows, *one.index), (two.rows, *two.index), strict=True)
    )
    assert torch.equal(signs[slots], sign)
    assert one.connections == two.connections == 200
    assert [event.weight for event in seen] == [one, two]
    assert torch.equal(seen[0].slots, seen[1].slots)

"""Scores above a bar, extremes, weakest: the native kernels equal their definitions to the bit, and
sorting.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from interpreter import run_python
from problems import Problem, problem
from rewire import _native, random
from rewire.ops import Draw, above, above_drawn, extremes, top_scores, uniforms, weakest

needs_native = pytest.mark.skipif(
    not _native.available("above"), reason="the C++ extension is not in use"
)
FLOATS = st.sampled_from((torch.float32, torch.float64))
ODD = (0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, -1.0)


def plainly(call):
    """What ``call`` gives without native kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_scores, "_NATIVE", False)
        return call()


def same(a, b) -> bool:
    a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
    return all(
        x.dtype == y.dtype and torch.equal(x.nan_to_num(nan=7.5), y.nan_to_num(nan=7.5))
        for x, y in zip(a, b, strict=True)
    )


def numbers(shape, levels: int, odd: float, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Random ones, with ties where there are few ``levels``, and a share of ``odd`` ones."""
    x = (
        torch.randn(shape, generator=g, dtype=dtype)
        if levels > 9
        else torch.randint(-levels, levels, shape, generator=g)
    )
    x = x.to(dtype)
    some = torch.rand(shape, generator=g) < odd
    choice = torch.randint(0, len(ODD), shape, generator=g)
    return torch.where(some, torch.tensor(ODD, dtype=dtype)[choice], x)


@st.composite
def tiles(draw):
    """A pool, a tile of scores, which slots are kept, and a bar."""
    n_rows, n_cols = (
        draw(st.integers(1, 30)),
        draw(st.sampled_from((1, 2, 3, 17, 64, 127, 128, 129, 300))),
    )
    share = draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    kind = draw(st.sampled_from((torch.int32, torch.int64)))
    p = problem(
        n_rows,
        n_cols,
        round(share * n_rows * n_cols),
        spare=draw(st.sampled_from((0, 3))),
        seed=draw(st.integers(0, 99)),
        index_dtype=kind,
    )
    first = draw(st.integers(0, n_rows))
    stop = draw(st.integers(first, n_rows))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shape = (stop - first, n_cols)
    scores = numbers(
        shape, draw(st.integers(1, 12)), draw(st.sampled_from((0.0, 0.3))), draw(FLOATS), g
    )
    kept = torch.rand(p.values.numel(), generator=g) < draw(st.sampled_from((0.0, 0.5, 1.0)))
    bar = draw(st.sampled_from((-math.inf, -1.0, 0.0, 0.5, 1.0, 3.0, math.inf)))
    return p, scores, first, kept, bar


@given(tile=tiles(), absolute=st.booleans())
def test_above_is_a_comparison_of_what_is_not_kept(tile, absolute: bool) -> None:
    p, scores, first, kept, bar = tile
    keys, found = above(scores, first, p.index, kept, bar, absolute=absolute)
    stop, lowest = first + scores.shape[0], torch.finfo(scores.dtype).min
    taken = torch.zeros(p.shape, dtype=torch.bool)
    here = (p.rows >= 0) & kept
    taken[p.rows[here], p.cols[here]] = True
    counts = (scores.abs() if absolute else scores).nan_to_num(
        nan=lowest, posinf=math.inf, neginf=lowest
    )
    expected = (counts > bar) & ~taken[first:stop]
    rows, cols = expected.nonzero().unbind(1)
    assert torch.equal(keys, (rows + first) * scores.shape[1] + cols)
    assert torch.equal(found, counts[expected])
    assert found.dtype == scores.dtype
    assert same(
        (keys, found), plainly(lambda: above(scores, first, p.index, kept, bar, absolute=absolute))
    )


@given(
    tile=tiles(),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 2**31 - 1),
)
def test_above_drawn_is_its_definition_and_misses_nothing(
    tile, seed: int, step: int, stream: int
) -> None:
    p, scores, first, kept, bar = tile
    draw = Draw(seed, step, stream, 1e-30)
    found = above_drawn(scores, first, p.index, kept, bar, draw)
    assert same(found, plainly(lambda: above_drawn(scores, first, p.index, kept, bar, draw)))
    keys, strength, u = found
    assert torch.equal(u, uniforms(draw, keys))
    everything, magnitude, v = above_drawn(scores, first, p.index, kept, -math.inf, draw)
    wins = everything[magnitude / -torch.log1p(-v) > bar]
    assert torch.isin(wins, keys).all()
    assert (strength >= 1e-30).all()


@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 2**31 - 1),
    positions=st.lists(st.integers(0, 2**62), max_size=20),
)
def test_uniforms_are_their_definition(
    seed: int, step: int, stream: int, positions: list[int]
) -> None:
    draw, at = Draw(seed, step, stream, 1e-30), torch.tensor(positions, dtype=torch.int64)
    found = uniforms(draw, at)
    assert same(found, plainly(lambda: uniforms(draw, at)))
    assert found.dtype == torch.float32
    words = random.words(seed, (at // 4) & 0xFFFFFFFF, at // 4 >> 32, step, stream)
    expected = [(float(words[p % 4][i]) + 0.5) / 2**32 for i, p in enumerate(positions)]
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
    )


@given(
    n=st.integers(0, 300),
    levels=st.integers(1, 12),
    odd=st.sampled_from((0.0, 0.2, 1.0)),
    dtype=FLOATS,
    largest=st.booleans(),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_extremes_are_the_first_of_a_stable_sort(
    n, levels, odd, dtype, largest, seed, data
) -> None:
    scores = numbers((n,), levels, odd, dtype, torch.Generator().manual_seed(seed))
    count = data.draw(st.integers(0, n))
    found = extremes(scores, count, largest=largest)
    rank = (-scores if largest else scores).tolist()
    order = sorted((i for i in range(n) if not math.isnan(rank[i])), key=rank.__getitem__)
    order += [i for i in range(n) if math.isnan(rank[i])]
    assert found.tolist() == sorted(order[:count])
    assert same(found, plainly(lambda: extremes(scores, count, largest=largest)))


@given(
    p=st.builds(problem, st.integers(1, 20), st.integers(1, 20), st.just(0)),
    share=st.floats(0, 1),
    fraction=st.floats(0, 1),
    by_sign=st.booleans(),
    weighted=st.booleans(),
    dtype=FLOATS,
    levels=st.integers(1, 12),
    kind=st.sampled_from((torch.int32, torch.int64)),
    seed=st.integers(0, 999),
)
def test_weakest_is_the_first_of_a_stable_sort(
    p: Problem, share, fraction, by_sign, weighted, dtype, levels, kind, seed
) -> None:
    g = torch.Generator().manual_seed(seed)
    capacity = p.shape[0] * p.shape[1]
    slots = torch.randperm(capacity, generator=g)[: round(share * capacity)].to(kind)
    values = numbers((capacity,), levels, 0.2, dtype, g)
    factors = torch.rand(capacity, generator=g, dtype=dtype) if weighted else None
    found = weakest(values, slots, fraction, by_sign=by_sign, factors=factors)
    product = values if factors is None else values * factors
    expected = []
    own = slots.tolist()
    for side in [lambda v: v >= 0, lambda v: v < 0] if by_sign else [lambda v: True]:
        members = [s for s in own if side(float(product[s]))]
        place = {s: i for i, s in enumerate(members)}
        real = sorted(
            (s for s in members if not math.isnan(product[s])), key=lambda s: abs(float(product[s]))
        )
        real += [s for s in members if math.isnan(product[s])]
        expected += sorted(real[: int(fraction * len(members))], key=place.__getitem__)
    assert found.tolist() == expected
    assert found.dtype == torch.int64
    assert same(
        found, plainly(lambda: weakest(values, slots, fraction, by_sign=by_sign, factors=factors))
    )


LARGE = """
import torch
from rewire import ops
from problems import problem
g = torch.Generator().manual_seed(0)
p = problem(600, 1000, 150_000, seed=1)
scores = torch.randn(600, 1000, generator=g)
kept = torch.rand(150_000, generator=g) < 0.7
draw = ops.Draw(5, 6, 7, 1e-30)
results = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    results.append([
        *ops.above(scores, 0, p.index, kept, 0.5, absolute=True),
        *ops.above_drawn(scores, 0, p.index, kept, 3.0, draw),
        ops.extremes(scores.flatten(), 200_000, largest=True),
        ops.extremes(scores.flatten(), 7, largest=False),
        ops.extremes(scores.flatten().double(), 100_000, largest=False),
        ops.weakest(p.values, p.index.row_slots, 0.3),
        ops.weakest(p.values, p.index.row_slots, 0.3, by_sign=True),
    ])
first = results[0]
assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(first, other, strict=True))
best = torch.sort(scores.flatten(), descending=True).indices[:200_000]
assert torch.equal(first[5], best.sort().values)
print([hash(tuple(t.tolist())) for t in first])
"""


@pytest.mark.slow
def test_large_ones_are_the_same_on_any_threads_and_instruction_set() -> None:
    printed = set()
    for environment in (
        {},
        {"REWIRE_CPU_CAPABILITY": "avx2"},
        {"REWIRE_CPU_CAPABILITY": "portable"},
        {"REWIRE_NATIVE": "0"},
    ):
        done = run_python(LARGE, **environment)
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout)
    assert len(printed) == 1


@needs_native
@given(tile=tiles(), data=st.data())
def test_no_integer_leads_outside(tile, data: st.DataObject) -> None:
    """Whatever an index holds, there is an error or an answer; never a crash (ASan stops at a bad
    access).
    """
    p, scores, first, kept, bar = tile
    index = [t.clone() for t in p.index]
    name = data.draw(st.integers(0, 2))
    if index[name].numel():
        at = data.draw(st.integers(0, index[name].numel() - 1))
        top = torch.iinfo(index[name].dtype).max
        index[name][at] = data.draw(st.sampled_from((-1, -top, top, index[name].numel(), 10**6)))
    damaged = type(p.index)(*index)
    for call in (
        lambda: above(scores, first, damaged, kept, bar),
        lambda: above_drawn(scores, first, damaged, kept, bar, Draw(1, 2, 3, 1e-30)),
        lambda: weakest(p.values, damaged.row_slots, 0.5),
    ):
        with contextlib.suppress(RuntimeError):
            call()


@needs_native
def test_what_cannot_be_is_refused() -> None:
    p = problem(4, 5, 6)
    scores, kept = torch.zeros(2, 5), torch.ones(6, dtype=torch.bool)
    for call in (
        lambda: above(scores, 3, p.index, kept, 0.0),
        lambda: above(scores, -1, p.index, kept, 0.0),
        lambda: above(scores, 2**62, p.index, kept, 0.0),
        lambda: above(scores, 0, p.index, kept[:3], 0.0),
        lambda: above(scores, 0, p.index, kept.float(), 0.0),
        lambda: above(scores[:, :1], 0, p.index, kept, 0.0),
        lambda: above(scores[0], 0, p.index, kept, 0.0),
        lambda: above_drawn(scores, 3, p.index, kept, 0.0, Draw(1, 2, 3, 0.0)),
        lambda: extremes(torch.zeros(3), 4, largest=True),
        lambda: extremes(torch.zeros(3), -1, largest=False),
        lambda: weakest(torch.zeros(3), torch.tensor([0, 3]), 0.5),
        lambda: weakest(torch.zeros(3), torch.tensor([0, -1]), 0.5),
        lambda: weakest(torch.zeros(3), torch.tensor([0, 1]), 1.5),
        lambda: weakest(torch.zeros(3), torch.tensor([0, 1]), math.nan),
        lambda: weakest(torch.zeros(3), torch.tensor([0, 1]), 0.5, factors=torch.zeros(2)),
    ):
        with pytest.raises(RuntimeError, match=r"rewire::\w+: "):
            call()

"""Topologies within limits: against SciPy's maximum flow, brute force and a plain loop."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewire import topology
from rewire.budget import Limits
from rewire.topology import TopologyError, dealing
from rewire.topology import limits as limited

ROWS, COLS = st.integers(1, 9), st.integers(1, 9)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[int, int, Limits]:
    rows, cols = draw(ROWS), draw(COLS)
    fan_in = draw(st.none() | st.integers(1, cols + 1))
    fan_out = draw(st.none() | st.integers(1, rows + 1))
    block = draw(
        st.none()
        | st.tuples(st.integers(1, rows + 1), st.integers(1, cols + 1), st.integers(1, 12))
    )
    return rows, cols, Limits(fan_in, fan_out, block)


def within(rows: torch.Tensor, cols: torch.Tensor, limits: Limits) -> bool:
    """By counting in Python."""
    pairs = list(zip(rows.tolist(), cols.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    fans = [Counter(r for r, _ in pairs), Counter(c for _, c in pairs)]
    ok = all(
        max(f.values(), default=0) <= (most or 10**9)
        for f, most in zip(fans, (limits.fan_in, limits.fan_out), strict=True)
    )
    if limits.block:
        h, w, count = limits.block
        ok = ok and max(Counter((r // h, c // w) for r, c in pairs).values(), default=0) <= count
    return ok


def most_by_program(rows: int, cols: int, limits: Limits) -> int:
    """The maximum by an integer program over all positions."""
    optimize = pytest.importorskip("scipy.optimize")
    positions = list(itertools.product(range(rows), range(cols)))
    groups: list[tuple[object, int]] = []
    if limits.fan_in:
        groups += [(lambda r, c, i=i: r == i, limits.fan_in) for i in range(rows)]
    if limits.fan_out:
        groups += [(lambda r, c, j=j: c == j, limits.fan_out) for j in range(cols)]
    if limits.block:
        h, w, n = limits.block
        groups += [
            (lambda r, c, i=i, j=j: (r // h, c // w) == (i, j), n)
            for i in range(-(-rows // h))
            for j in range(-(-cols // w))
        ]
    if not groups:
        return rows * cols
    a = np.array([[float(f(r, c)) for r, c in positions] for f, _ in groups])  # type: ignore[operator]
    found = optimize.milp(
        -np.ones(len(positions)),
        constraints=optimize.LinearConstraint(a, ub=[n for _, n in groups]),
        integrality=np.ones(len(positions)),
        bounds=optimize.Bounds(0, 1),
    )
    return round(-found.fun)


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_maximum_is_that_of_an_integer_program(matrix: tuple[int, int, Limits]) -> None:
    rows, cols, limits = matrix
    assert limits.maximum(rows, cols) == most_by_program(rows, cols, limits)


@given(matrices(), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_sampling_is_exact_up_to_the_maximum(
    matrix: tuple[int, int, Limits], share: float, seed: int
) -> None:
    rows, cols, limits = matrix
    most = limits.maximum(rows, cols)
    for k in {most, round(share * most), max(most - 1, 0)}:
        r, c = limited.sample(rows, cols, k, limits, seed)
        assert r.numel() == k
        assert within(r, c, limits)
        assert bool(((r >= 0) & (r < rows) & (c >= 0) & (c < cols)).all())
        # What greedy drawing leaves undone is dealt out: try that road alone as well.
        if k:
            dealt = dealing.dealt(rows, cols, k, limits, seed)
            assert within(*dealt, limits)
            keys = dealing.mixed(cols, *dealt, limits, seed)
            assert keys.unique().numel() == k
            assert within(keys // cols, keys % cols, limits)
    with pytest.raises(ValueError, match=f"at most {most} do"):
        limited.sample(rows, cols, most + 1, limits, seed)


def test_large_and_tight() -> None:
    limits = Limits(fan_in=20, fan_out=30, block=(64, 64, 44))
    rows, cols = 3000, 2000
    most = limits.maximum(rows, cols)
    assert most == 2000 * 30 == 3000 * 20
    r, c = limited.sample(rows, cols, most, limits, 1)
    assert within(r, c, limits)
    assert torch.equal(torch.bincount(r), torch.full((rows,), 20))
    assert torch.equal(torch.bincount(c), torch.full((cols,), 30))
    other = limited.sample(rows, cols, most, limits, 2)
    same = set(zip(r.tolist(), c.tolist(), strict=True)) & set(
        zip(*(t.tolist() for t in other), strict=True)
    )
    assert len(same) < 0.05 * most  # another seed, another topology


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_first_fitting_is_a_loop(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 40))
    groups = [
        torch.tensor(
            data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), dtype=torch.int64
        )
        for _ in range(3)
    ]
    room = [
        torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=6, max_size=6)))
        for _ in range(3)
    ]
    count = data.draw(st.integers(0, 40))
    left, want = [r.tolist() for r in room], []
    for i in range(n):
        if len(want) < count and all(
            own[int(g[i])] > 0 for own, g in zip(left, groups, strict=True)
        ):
            want.append(i)
            for own, g in zip(left, groups, strict=True):
                own[int(g[i])] -= 1
    assert limited.first_fitting(groups, room, count).tolist() == want


@given(matrices(), st.integers(0, 99), st.data())
@settings(max_examples=150, deadline=None)
def test_growing_replaces_exactly_and_fits(
    matrix: tuple[int, int, Limits], seed: int, data: st.DataObject
) -> None:
    rows, cols, limits = matrix
    k = data.draw(st.integers(1, limits.maximum(rows, cols)))
    r, c = limited.sample(rows, cols, k, limits, seed)
    index = topology.build_index(r, c, rows, cols)
    dropped = torch.tensor(
        data.draw(st.lists(st.integers(0, k - 1), unique=True)), dtype=torch.int64
    )
    stay = torch.ones(k, dtype=torch.bool)
    stay[dropped] = False
    preferred = None
    if data.draw(st.booleans()):
        every = torch.arange(rows * cols)
        free = every[~torch.isin(every, (r * cols + c)[stay])]
        free = free[torch.randperm(free.numel(), generator=torch.Generator().manual_seed(seed))]
        preferred = free // cols, free % cols
    new = limited.grow(
        index, rows, cols, dropped.numel(), r[dropped], c[dropped], limits, seed, 3, 9, preferred
    )
    assert new[0].numel() == dropped.numel()
    assert within(torch.cat([r[stay], new[0]]), torch.cat([c[stay], new[1]]), limits)
    again = limited.grow(
        index, rows, cols, dropped.numel(), r[dropped], c[dropped], limits, seed, 3, 9, preferred
    )
    assert torch.equal(new[0], again[0])
    assert torch.equal(new[1], again[1])
    if preferred is not None and not limits.kinds:  # the best, in their order
        assert torch.equal(new[0], preferred[0][: dropped.numel()])
        assert torch.equal(new[1], preferred[1][: dropped.numel()])


def test_growing_is_uniform_over_what_fits() -> None:
    limits = Limits(fan_in=2, block=(2, 2, 2))
    r, c = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 3])
    index = topology.build_index(r, c, 3, 4)
    fits = [
        (i, j)
        for i, j in itertools.product(range(3), range(4))
        if (i, j) not in {(0, 0), (0, 1), (1, 2)}
        and within(torch.tensor([0, 0, 1, i]), torch.tensor([0, 1, 2, j]), limits)
    ]
    counts = Counter(
        tuple(int(t) for t in limited.grow(index, 3, 4, 1, r[3:], c[3:], limits, 5, step, 9))
        for step in range(1000)
    )
    assert set(counts) == set(fits)
    expected = 1000 / len(fits)
    # chi-square, about 6 degrees of freedom
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 30


def test_more_than_was_dropped_may_not_fit() -> None:
    limits = Limits(fan_in=1)
    index = topology.build_index(torch.tensor([0, 1]), torch.tensor([0, 0]), 2, 3)
    with pytest.raises(TopologyError, match="fan-in 1"):
        limited.grow(index, 2, 3, 2, torch.tensor([0]), torch.tensor([0]), limits, 0, 0, 1)


@pytest.mark.parametrize(
    "bad",
    [
        {"fan_in": 0},
        {"fan_out": -1},
        {"fan_in": 1.5},
        {"block": (2, 2)},
        {"block": (2, 0, 1)},
        {"block": (2, None, 1)},
    ],
)
def test_bad_limits_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|three numbers"):
        Limits(**bad)  # type: ignore[arg-type]


def test_numbers_for_a_file() -> None:
    for limits in (Limits(), Limits(3), Limits(None, 4), Limits(1, 2, (3, 4, 5))):
        assert Limits.from_numbers(limits.as_numbers()) == limits
    with pytest.raises(ValueError, match="five"):
        Limits.from_numbers([1])

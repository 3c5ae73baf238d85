"""Schedules: end points, shapes by hand, bounds, and that they can be kept and compared."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewire import schedules
from rewire.schedules import Constant, Cosine, Cubic, Exponential, Linear, Step

ALL = [
    Constant(0.3),
    Linear(1.0, 0.0, 10),
    Cosine(0.3, 10),
    Cubic(0.0, 0.9, 10, begin=5),
    Exponential(1.0, 0.9, 0.01),
    Step(1.0, 0.1, (5, 8)),
]

finite = st.floats(-100, 100)
steps = st.integers(1, 10_000)


def test_by_hand() -> None:
    assert Constant(0.3)(7) == 0.3
    assert [Linear(1.0, 0.0, 4)(t) for t in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [Cosine(0.3, 2)(t) for t in (0, 1, 2, 9)] == pytest.approx([0.3, 0.15, 0.0, 0.0])
    assert Cosine(0.3, 4)(1) == pytest.approx(0.3 / 2 * (1 + math.cos(math.pi / 4)))
    # Zhu and Gupta, equation 1: s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3
    assert [Cubic(0.0, 0.8, 4, begin=2)(t) for t in (0, 2, 4, 6, 99)] == pytest.approx(
        [0.0, 0.0, 0.8 * (1 - 0.5**3), 0.8, 0.8]
    )
    assert [Exponential(1.0, 0.5, 0.2)(t) for t in range(4)] == [1.0, 0.5, 0.25, 0.2]
    assert [Step(1.0, 0.1, (2, 3))(t) for t in range(5)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])


@given(finite, finite, steps, st.integers(0, 20_000))
def test_between_start_and_end(start: float, end: float, n: int, t: int) -> None:
    low, high = min(start, end), max(start, end)
    for schedule in (Linear(start, end, n), Cosine(start, n, end), Cubic(start, end, n)):
        assert schedule(0) == pytest.approx(start)
        assert schedule(n) == pytest.approx(end, abs=1e-9)
        assert low - 1e-9 <= schedule(t) <= high + 1e-9
        assert schedule(n + t) == schedule(n)


@pytest.mark.parametrize("n", [0, -1])
def test_steps_must_be_positive(n: int) -> None:
    for make in (lambda: Linear(1, 0, n), lambda: Cosine(1, n), lambda: Cubic(1, 0, n)):
        with pytest.raises(ValueError, match=f"steps must be at least 1, not {n}"):
            make()


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_stateless_comparable_picklable(schedule: schedules.Schedule) -> None:
    first = [schedule(t) for t in range(30)]
    assert [schedule(t) for t in reversed(range(30))] == first[::-1]
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule
    assert [again(t) for t in range(30)] == first


def test_at_takes_numbers_and_callables() -> None:
    assert schedules.at(0.5, 9) == 0.5
    assert schedules.at(Linear(0.0, 1.0, 10), 5) == 0.5
    assert schedules.at(lambda t: t * 2.0, 4) == 8.0


def test_checked_returns_what_it_was_given() -> None:
    schedule = Cosine(0.3, 10)
    assert schedules.checked("x", schedule, 0.0, 1.0) is schedule
    assert schedules.checked("x", 0.0, 0.0) == 0.0
    assert schedules.checked("x", 1, 0.0, 1.0) == 1


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_checked_refuses(bad: float) -> None:
    for value in (bad, Constant(bad)):
        with pytest.raises(ValueError, match="drop must be a finite number between 0 and 1"):
            schedules.checked("drop", value, 0.0, 1.0)


def test_checked_without_upper_limit() -> None:
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="lr must be a finite number at least 0"):
            schedules.checked("lr", bad, 0.0)
    with pytest.raises(ValueError, match="lr must be"):
        schedules.checked("lr", "much", 0.0)  # type: ignore[arg-type]

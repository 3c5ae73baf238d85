"""Timing in turns, ratios, break-even, lines, verdicts: pure functions and a clock that does what
it is told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from rewire.app.bench import tables, targets
from rewire.app.bench.curves import Setting, break_even
from rewire.app.bench.targets.big import fit
from rewire.app.bench.timing import Contender, Ratio, Timings, quartiles, side_by_side
from rewire.app.bench.verdict import Figure, at_least, at_most, info, judge, missing
from rewire.app.errors import BenchError, NotAvailable


@dataclass
class Clock:
    """Time that passes only when a contender runs."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_quartiles() -> None:
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no values"):
        quartiles([])


def test_contenders_are_timed_in_turns_with_blocks_that_fit() -> None:
    clock = Clock()
    fast = Contender("fast", lambda: clock.spend(0.001))
    slow = Contender("slow", lambda: clock.spend(0.05))
    timings = side_by_side([fast, slow], seconds=0.0, rounds=4, block=0.01, clock=clock)
    assert timings.calls == {"fast": 10, "slow": 1}
    assert timings.seconds["fast"] == pytest.approx([0.001] * 4)
    assert timings.ratio("slow", "fast").median == pytest.approx(50)
    assert timings.ratio("slow", "fast").rounds == 4


def test_rounds_go_on_until_the_time_is_used() -> None:
    clock = Clock()
    timings = side_by_side(
        [Contender("a", lambda: clock.spend(0.1))], seconds=1.95, rounds=3, clock=clock
    )
    assert len(timings.seconds["a"]) == 20


def test_a_slow_moment_of_the_machine_does_not_move_the_ratio() -> None:
    clock = Clock()

    def work(seconds: float) -> None:
        clock.spend(seconds * (10 if 2.0 < clock.now < 4.0 else 1))

    contenders = [Contender("a", lambda: work(0.02)), Contender("b", lambda: work(0.04))]
    ratio = side_by_side(contenders, seconds=8.0, rounds=5, clock=clock).ratio("b", "a")
    assert ratio.median == pytest.approx(2)
    assert ratio.of_best == pytest.approx(2)


def test_threads_are_set_for_a_contender_and_restored() -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    side_by_side(
        [Contender("a", lambda: seen.append(torch.get_num_threads()), threads=2)],
        seconds=0.0,
        rounds=2,
    )
    assert set(seen) == {2}
    assert torch.get_num_threads() == before


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="distinct"):
        side_by_side([Contender("a", lambda: None)] * 2)


def test_ratio_compares_within_rounds() -> None:
    timings = Timings({"a": [1.0, 10.0, 2.0], "b": [2.0, 20.0, 4.0]})
    assert timings.ratio("b", "a") == Ratio(2.0, 2.0, 2.0, 2.0, 3)


@pytest.mark.parametrize(
    ("speedups", "found"),
    [
        ((4.0, 2.0, 0.5), 0.2),
        ((4.0, 2.0, 1.0), None),
        ((0.9, 0.5, 0.1), 0.0),
        ((2.0, 0.5, 0.1), 0.1 / math.sqrt(2)),
    ],
)
def test_break_even(speedups: tuple[float, ...], found: float | None) -> None:
    densities = (0.05, 0.1, 0.4)
    result = break_even(densities, speedups)
    if found is None:
        assert result is None
    else:
        assert result == pytest.approx(found)
        shuffled = break_even(densities[::-1], speedups[::-1])
        assert shuffled == pytest.approx(found)


def test_fit() -> None:
    offset, slope, r2 = fit([1, 2, 3], [5, 7, 9])
    assert (offset, slope, r2) == pytest.approx((3, 2, 1))
    assert fit([0, 1, 2, 3], [0, 1, 0, 1])[2] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="two points"):
        fit([1], [1])


def test_verdicts() -> None:
    good, bad = at_least("a", 2.0, 1.0), at_most("b", 3.0, 2.0, "B")
    assert (good.met, bad.met, info("c", 1.0).met) == (True, False, None)
    assert at_least("a", 1.0, 1.0).met
    assert at_most("a", 1.0, 1.0, "").met
    assert (good.margin, bad.margin) == (2.0, pytest.approx(2 / 3))
    assert judge([good]) == "met"
    assert judge([good, bad]) == "missed"
    assert judge([good, missing("d", "not here")]) == "in part"
    assert judge([bad, missing("d", "not here")]) == "missed"
    assert judge([info("c", 1.0)]) == "no target"
    assert judge([]) == "no target"


def test_a_figure_of_a_ratio_has_its_quartiles() -> None:
    figure = at_least("a", Ratio(3.0, 2.0, 4.0, 3.5, 9), 2.5, note="why")
    assert figure == Figure("a", 3.0, "x", ">=", 2.5, 2.0, 4.0, "why; best times 3.5, 9 rounds")
    assert figure.to_json()["met"] is True


def test_bars_are_chosen_in_their_own_order() -> None:
    assert [target.name for target in targets.choose(["P3", " p1"])] == ["p1", "p3"]
    assert list(targets.TARGETS) == [f"p{n}" for n in range(1, 17)]
    with pytest.raises(BenchError, match="no 'p17'"):
        targets.choose(["p17"])


def test_a_bar_that_cannot_be_measured_is_not_available() -> None:
    def measure(setting: Setting) -> targets.Measured:
        raise NotAvailable("no such layer")

    result = targets.run(targets.Target("p0", "nothing", measure), Setting())
    assert (result.status, result.reason, result.figures) == ("not available", "no such layer", ())
    table = tables.target(result.to_json())
    assert "no such layer" in table.note


def test_numbers_as_printed() -> None:
    assert [tables.duration(s) for s in (2e-6, 3.14159e-3, 2.5, 2500.0)] == [
        "2 us",
        "3.14 ms",
        "2.5 s",
        "2.5e+03 s",
    ]
    assert [tables.number(v, "B") for v in (None, 36.04, 12345.6, 0.99234)] == [
        "not available",
        "36 B",
        "12,346 B",
        "0.9923 B",
    ]

"""Times of several contenders side by side, robust against a machine that does other things as
well.

Every contender runs once per round, in an order that rotates from round to round, so a slow moment
of the machine meets all of them alike. What is compared is the ratio of two contenders *within* a
round, and its median over the rounds. One run is a block of calls long enough for the clock, after
an untimed call that fills the caches.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["Clock", "Contender", "Ratio", "Timings", "quartiles", "side_by_side", "timed"]

#: Seconds from anywhere.
Clock = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """What is timed: its name, one call, and its number of threads (None: as many as are set)."""

    name: str
    run: Callable[[], object]
    threads: int | None = None


@dataclass(frozen=True)
class Ratio:
    """How many times as long one contender takes as another; ``of_best`` of the best times."""

    median: float
    low: float
    high: float
    of_best: float
    rounds: int


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of a single value three times that value."""
    if not values:
        raise ValueError("no values to summarise")
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@dataclass(frozen=True)
class Timings:
    """Seconds per call, by contender and round; equal indices are of the same round."""

    seconds: Mapping[str, Sequence[float]]
    calls: Mapping[str, int] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median seconds per call."""
        return quartiles(self.seconds[name])[1]

    def quartiles(self, name: str) -> tuple[float, float]:
        """First and third quartile of the seconds per call."""
        low, _, high = quartiles(self.seconds[name])
        return low, high

    def best(self, name: str) -> float:
        """Least disturbed seconds per call."""
        return min(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> Ratio:
        """How many times as long ``slow`` takes as ``fast``, compared within rounds."""
        pairs = [a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True)]
        low, middle, high = quartiles(pairs)
        return Ratio(middle, low, high, self.best(slow) / self.best(fast), len(pairs))


def timed(clock: Clock, *calls: Callable[[], object]) -> float:
    """Seconds that the calls take, one after the other; never 0."""
    start = clock()
    for call in calls:
        call()
    return max(clock() - start, 1e-9)


def side_by_side(
    contenders: Sequence[Contender],
    *,
    seconds: float = 3.0,
    rounds: int = 7,
    block: float = 0.005,
    most_rounds: int = 200,
    clock: Clock = time.perf_counter,
) -> Timings:
    """Time the contenders in turns.

    Args:
        seconds: go on with further rounds until this time is used.
        rounds: but make at least as many.
        block: one measurement calls a contender until about so many seconds have passed.
        clock: seconds, from anywhere.
    """
    names = [c.name for c in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"contenders need distinct names, not {names}")
    before = torch.get_num_threads()
    took: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    try:
        calls = {c.name: _calls(c, before, block, clock) for c in contenders}
        gc.collect()
        gc.disable()
        start, done = clock(), 0
        while done < rounds or (clock() - start < seconds and done < most_rounds):
            first = done % len(contenders) if contenders else 0
            for contender in (*contenders[first:], *contenders[:first]):
                took[contender.name].append(
                    _measure(contender, calls[contender.name], before, clock)
                )
            done += 1
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()
    return Timings(took, calls)


def _use(threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _calls(contender: Contender, threads: int, block: float, clock: Clock) -> int:
    """Warm up, and return how many calls make a block: by the faster of two calls."""
    _use(contender.threads or threads)
    contender.run()
    once = []
    for _ in range(2):
        start = clock()
        contender.run()
        once.append(clock() - start)
    return max(1, min(1000, round(block / max(min(once), 1e-9))))


def _measure(contender: Contender, calls: int, threads: int, clock: Clock) -> float:
    _use(contender.threads or threads)
    if calls > 1:  # a contender slower than a block finds no warm caches in a training step either
        contender.run()
    start = clock()
    for _ in range(calls):
        contender.run()
    return max(clock() - start, 1e-9) / calls

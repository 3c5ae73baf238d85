"""One layer over densities: all ways to compute it, and where sparse and dense break even."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rewire.app.bench import child
from rewire.app.bench.contenders import DENSE, LAYERS, Layer, Linear, can_make, make
from rewire.app.bench.timing import Clock, Contender, Timings, side_by_side

__all__ = ["Curve", "Setting", "break_even", "installed", "measure"]


@dataclass(frozen=True)
class Setting:
    """How thoroughly to measure.

    Attributes:
        seconds, rounds: of each contest, at least.
        quick: make the large problems small.
        cpu_time: count the CPU seconds of the process instead of the wall clock's: with one thread
            they hardly depend on what else the machine does.
    """

    threads: int = 2
    seconds: float = 4.0
    rounds: int = 9
    quick: bool = False
    cpu_time: bool = False

    @property
    def clock(self) -> Clock:
        """The clock of the wall, or that of this process."""
        return time.process_time if self.cpu_time else time.perf_counter

    def apart(self, task: str, **arguments: Any) -> dict[str, Any]:
        """`child.measure` with these threads and this clock."""
        return child.measure(task, arguments, threads=self.threads, cpu_time=self.cpu_time)

    def contest(self, contenders: Sequence[Contender]) -> Timings:
        """`side_by_side` with these rounds and this clock."""
        return side_by_side(contenders, seconds=self.seconds, rounds=self.rounds, clock=self.clock)


def installed(kinds: Sequence[str] = LAYERS) -> list[str]:
    """Those of ``kinds`` that can be measured here."""
    return [kind for kind in kinds if can_make(kind)]


@dataclass(frozen=True)
class Curve:
    """Times of the contenders for one layer size and batch, over densities."""

    inputs: int
    outputs: int
    batch: int
    densities: tuple[float, ...]
    kinds: tuple[str, ...]
    timings: Timings

    @staticmethod
    def label(kind: str, density: float) -> str:
        """What the contest calls a contender; those of `DENSE` take part once."""
        return kind if kind in DENSE else f"{kind} @ {density:g}"

    def seconds(self, kind: str, density: float) -> float:
        """Median seconds per forward + backward."""
        return self.timings.median(self.label(kind, density))

    def ratio(self, slow: str, fast: str, density: float) -> Any:
        """`Timings.ratio` of two contenders at a density."""
        return self.timings.ratio(self.label(slow, density), self.label(fast, density))

    def break_even(self, dense: str, sparse: str = "rewire") -> float | None:
        """`break_even` of ``sparse`` with ``dense``, over the densities of this curve."""
        return break_even(
            self.densities, [self.ratio(dense, sparse, d).median for d in self.densities]
        )

    def to_json(self) -> dict[str, Any]:
        """For the results file; seconds are medians, by kind in the order of the densities."""
        sparse = [kind for kind in self.kinds if kind not in DENSE]
        dense = [kind for kind in self.kinds if kind in DENSE and kind != "masked"]
        return {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "batch": self.batch,
            "densities": list(self.densities),
            "seconds": {
                kind: [self.seconds(kind, d) for d in self.densities] for kind in self.kinds
            },
            "quartiles": {
                kind: [self.timings.quartiles(self.label(kind, d)) for d in self.densities]
                for kind in self.kinds
            },
            "best": {
                kind: [self.timings.best(self.label(kind, d)) for d in self.densities]
                for kind in self.kinds
            },
            "rounds": len(next(iter(self.timings.seconds.values()))),
            "break_even": {f"{s} / {d}": self.break_even(d, s) for s in sparse for d in dense},
        }


def measure(
    inputs: int,
    outputs: int,
    batch: int,
    densities: Sequence[float],
    setting: Setting,
    kinds: Sequence[str] = LAYERS,
) -> Curve:
    """Run one contest over all densities and those of ``kinds`` that are installed."""
    kinds = installed(kinds)
    contenders: list[Contender] = []
    for number, density in enumerate(densities):
        problem = Linear(Layer.of(inputs, outputs, density, batch))
        mine = [kind for kind in kinds if number == 0 or kind not in DENSE]
        contenders += [make(kind, problem, label=Curve.label(kind, density)) for kind in mine]
        problem.__dict__.pop("dense", None)  # a dense copy for each density would fill the memory
    return Curve(
        inputs, outputs, batch, tuple(densities), tuple(kinds), setting.contest(contenders)
    )


def break_even(densities: Sequence[float], speedups: Sequence[float]) -> float | None:
    """Where the speed-up over dense falls through 1, linear in the logarithms between the densities
    tried.

    0.0 if it is below 1 at the lowest density already, None if it is at least 1 at every density.
    """
    points = sorted(zip(densities, speedups, strict=True))
    if points and points[0][1] < 1:
        return 0.0
    for (d0, s0), (d1, s1) in pairwise(points):
        if s0 >= 1 > s1:
            share = math.log(s0) / math.log(s0 / s1)
            return math.exp(math.log(d0) + share * math.log(d1 / d0))
    return None

"""The bars, one small function each, in files by theme; `run` measures and judges one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rewire.app.bench.bars import big, conv, layers, memory, training
from rewire.app.bench.curves import Setting
from rewire.app.bench.machine import Load
from rewire.app.bench.verdict import BarResult, Figure, judge
from rewire.app.errors import BenchError, NotAvailable

__all__ = ["BARS", "Bar", "choose", "run"]

Measured = tuple[list[Figure], dict[str, Any]]


@dataclass(frozen=True)
class Bar:
    """A bar: what it is about and the function that measures its figures (and data for the
    pictures).
    """

    name: str
    title: str
    measure: Callable[[Setting], Measured]


BARS: dict[str, Bar] = {
    bar.name: bar
    for bar in (
        Bar("p1", "SparseLinear against nn.Linear, batch 128", layers.against_dense),
        Bar("p2", "SparseLinear against SparseProp and torch.sparse.mm", layers.against_sparse),
        Bar("p3", "density at which SparseLinear breaks even, 1024 x 1024", layers.breaks_even),
        Bar("p4", "the second thread, 4096 x 4096", layers.second_thread),
        Bar(
            "p5", "DEEP R step over forward + backward + optimizer, K = 10^6", training.deep_r_share
        ),
        Bar(
            "p6",
            "updates at their papers' frequency, share of training time",
            training.update_share,
        ),
        Bar(
            "p7", "training step of LeNet-300-100 with DEEP R, against masked dense", training.lenet
        ),
        Bar("p8", "SparseConv2d 3x3 against the best dense convolution", conv.against_dense),
        Bar("p9", "bytes per connection in training", memory.per_connection),
        Bar("p10", "30,000 x 30,000, K = 10^4 to 10^8: time and memory are lines", big.line),
        Bar("p11", "10^6 x 10^6, K = 10^7", big.million),
        Bar("p12", "small networks: whole step, and an 8 x 8 layer", training.small),
    )
}


def choose(names: Iterable[str]) -> list[Bar]:
    """The bars of these names, in their own order. Raises `BenchError` for a name that is none."""
    wanted = [name.strip().lower() for name in names]
    for name in wanted:
        if name not in BARS:
            raise BenchError(f"--bars: there is no bar {name!r}; allowed are {', '.join(BARS)}")
    return [bar for bar in BARS.values() if bar.name in wanted]


def run(bar: Bar, setting: Setting) -> BarResult:
    """Measure a bar; one that cannot be measured here is "not available", with the reason."""
    load, start = Load(), time.perf_counter()
    try:
        figures, data = bar.measure(setting)
    except NotAvailable as error:
        return BarResult(bar.name, bar.title, (), "not available", str(error))
    seconds = time.perf_counter() - start
    return BarResult(
        bar.name, bar.title, tuple(figures), judge(figures), "", seconds, load.others(), data
    )

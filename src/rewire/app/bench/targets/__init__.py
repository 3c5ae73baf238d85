"""The performance targets: a function each, in files by theme. `run` measures and judges."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rewire.app.bench.curves import Setting
from rewire.app.bench.machine import Load
from rewire.app.bench.targets import big, conv, inference, layers, training, transformer
from rewire.app.bench.verdict import Measured, TargetResult, judge
from rewire.app.errors import BenchError, NotAvailable

__all__ = ["TARGETS", "Target", "choose", "run"]


@dataclass(frozen=True)
class Target:
    """A performance target: what it is about, and the function that measures it."""

    name: str
    title: str
    measure: Callable[[Setting], Measured]


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("p1", "SparseLinear: share of the ceiling, and nn.Linear", layers.against_ceiling),
        Target(
            "p2", "SparseLinear against SparseProp, SparseLab, torch.sparse", layers.against_sparse
        ),
        Target("p3", "density at which SparseLinear breaks even, 1024 x 1024", layers.breaks_even),
        Target("p4", "the second thread, 4096 x 4096", layers.second_thread),
        Target(
            "p5", "DEEP R step over forward + backward + optimizer, K = 10^6", training.deep_r_share
        ),
        Target(
            "p6",
            "updates at their papers' frequency, share of training time",
            training.update_share,
        ),
        Target(
            "p7", "training step of LeNet-300-100 with DEEP R, against masked dense", training.lenet
        ),
        Target("p8", "SparseConv2d 3x3 against the best dense convolution", conv.against_dense),
        Target("p9", "bytes per connection in training", big.per_connection),
        Target("p10", "30,000 x 30,000, K = 10^4 to 10^8: time and memory are lines", big.line),
        Target("p11", "10^6 x 10^6, K = 10^7", big.million),
        Target("p12", "small networks: whole step, and an 8 x 8 layer", training.small),
        Target("p13", "fed row-major, over the same fed feature-major", layers.row_major),
        Target("p14", "a frozen layer's forward pass, batch 1, 8 and 64", inference.forward),
        Target("p15", "a training step of a mini-GPT with RigL", transformer.step),
        Target("p16", "memory of a training step at 8,192 rows", big.step_memory),
    )
}


def choose(names: Iterable[str]) -> list[Target]:
    """The targets of these names, in their own order. Raises `BenchError` for an unknown name."""
    wanted = [name.strip().lower() for name in names]
    for name in wanted:
        if name not in TARGETS:
            raise BenchError(f"--targets: there is no {name!r}; allowed are {', '.join(TARGETS)}")
    return [target for target in TARGETS.values() if target.name in wanted]


def run(target: Target, setting: Setting) -> TargetResult:
    """Measure and judge a target; if that cannot be done here, it is "not available"."""
    load, start = Load(), time.perf_counter()
    try:
        figures, data = target.measure(setting)
    except NotAvailable as error:
        return TargetResult(target.name, target.title, (), "not available", str(error))
    seconds = time.perf_counter() - start
    return TargetResult(
        target.name, target.title, tuple(figures), judge(figures), "", seconds, load.others(), data
    )

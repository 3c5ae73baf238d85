"""The machine's own ceilings: how many multiply-adds a second it does with numbers in registers,
and with one factor read from each level of its memory.

A sparse product reads an entry of x for each of its multiply-adds, so no kernel passes the ceiling
of the level where x lies. A figure's share of it means the same on every machine; a speed-up over
a dense product, which keeps its numbers in registers, does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rewire import _native
from rewire.app.bench.curves import Setting
from rewire.app.bench.timing import Clock, timed

__all__ = ["Ceilings", "Level", "cache_sizes", "of"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
#: Bytes of a core's caches where the system does not tell.
_USUAL = (32 << 10, 1 << 20, 8 << 20)
#: Most bytes that a thread reads. A last cache that is larger is shared with many others, on a
#: server with other machines, so that this much is not in it for long.
_MOST = 256 << 20
#: Rows are a multiple of so many numbers long.
_BLOCK = 192
#: Rows of x that the kernels keep in a cache together.
TOGETHER = 128


@dataclass(frozen=True)
class Level:
    """A level of the memory.

    Attributes:
        bytes: that one thread has there; None for the last level, the memory itself.
        flops: operations a second (a multiply-add is two) of all threads, with numbers from there.
    """

    name: str
    bytes: int | None
    flops: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do.

    Attributes:
        peak: operations a second with numbers in registers.
        levels: from the nearest to the farthest.
    """

    peak: float
    levels: tuple[Level, ...]

    def holding(self, size: int) -> Level:
        """The nearest level that holds ``size`` bytes."""
        return next(x for x in self.levels if x.bytes is None or size <= x.bytes)

    def for_rows(self, features: int, rows: int) -> Level:
        """Where x (rows, features) of float32 lies while a product works on it: 128 rows of it at
        most, which is what the kernels keep together.
        """
        return self.holding(4 * features * min(rows, TOGETHER))

    def to_json(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self)


def cache_sizes(folder: Path = _CACHES) -> tuple[int, ...]:
    """Bytes of the first core's data caches, from the nearest on."""
    sizes: dict[int, int] = {}
    units = {"K": 10, "M": 20, "G": 30}
    try:
        for cache in sorted(folder.glob("index*")):
            if (cache / "type").read_text().strip() != "Instruction":
                size = (cache / "size").read_text().strip()
                unit = units.get(size[-1:], 0)
                sizes[int((cache / "level").read_text())] = int(size.rstrip("KMG")) << unit
    except (OSError, ValueError):
        sizes = {}
    return tuple(sizes[level] for level in sorted(sizes)) or _USUAL


def of(setting: Setting) -> Ceilings | None:
    """The ceilings for a setting's threads, measured once in a process; None without the native
    kernels. Takes about a second.
    """
    if not _native.available("multiply_adds"):
        return None
    return _measured(setting.threads, setting.clock, min(0.05, setting.seconds / 20))


@functools.cache
def _measured(threads: int, clock: Clock, seconds: float) -> Ceilings:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        *caches, last = cache_sizes()
        own = [*caches, last // threads]  # the last cache is shared
        levels = [
            Level(f"L{number}", size, _rate(threads, min(size // 2, _MOST), clock, seconds))
            for number, size in enumerate(own, start=1)
        ]
        memory = Level("memory", None, _rate(threads, min(4 * own[-1], _MOST), clock, seconds))
        return Ceilings(_rate(threads, own[0] // 2, clock, seconds, False), (*levels, memory))
    finally:
        torch.set_num_threads(before)


def _rate(threads: int, size: int, clock: Clock, seconds: float, from_memory: bool = True) -> float:
    """Operations a second of all threads, each with ``size`` bytes of its own: the best of five."""
    x = torch.ones(threads, max(1, size // (4 * _BLOCK)) * _BLOCK)
    call: Callable[..., float] = torch.ops.rewire.multiply_adds

    def took(passes: int) -> float:
        return timed(clock, lambda: call(x, passes, from_memory))

    took(1)
    passes, once = 1, took(1)
    while once < seconds:  # a clock may be coarse
        passes = max(2 * passes, min(100 * passes, round(passes * seconds / once)))
        once = took(passes)
    best = min(once, *(took(passes) for _ in range(4)))
    return 2 * x.numel() * passes / best

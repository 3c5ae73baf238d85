"""What the figures were measured on, and how busy it was with other things."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rewire import _native
from rewire._version import __version__

__all__ = ["Load", "available_memory", "describe", "pin"]

#: What changes how threads wait for each other. By default they spin, which is best on a quiet
#: machine; on a busy one a thread then spins while the one it waits for does not get a core, and
#: everything takes ten times as long.
OPENMP = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "KMP_BLOCKTIME")
#: Packages that are measured beside ours.
OTHERS = ("sparseprop", "sparselab", "onnxruntime")


def pin(threads: int) -> list[int] | None:
    """Keep this process on ``threads`` cores and return them; None where that cannot be done."""
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))[:threads]
    try:
        os.sched_setaffinity(0, cores)
    except OSError:
        return None
    return cores


def _from_proc(file: str, key: str) -> str | None:
    """What a file of /proc says after ``key``, the first time; None if it does not."""
    try:
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return None


def _memory(key: str) -> int | None:
    found = _from_proc("meminfo", f"{key}:")
    return int(found.split()[0]) * 1024 if found else None


def available_memory() -> int | None:
    """Bytes that can be had without swapping, if known."""
    return _memory("MemAvailable")


def _version(name: str) -> str | None:
    """Of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe(cores: list[int] | None) -> dict[str, Any]:
    """Processor, memory, versions, threads, load; nothing that names the machine or its user."""
    memory = _memory("MemTotal")
    return {
        "cpu": _from_proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "pinned_to": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "openmp": {name: os.environ[name] for name in OPENMP if name in os.environ},
        "kernels": _native.describe(),
        "rewire": __version__,
        "torch": torch.__version__,
        "others": {name: _version(name) for name in OTHERS},
        "python": platform.python_version(),
        "system": platform.system(),
        "load_average": [round(x, 2) for x in os.getloadavg()]
        if hasattr(os, "getloadavg")
        else None,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


class Load:
    """The share of the machine that others (processes, hypervisor) took since construction."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds so far: of all cores, of the busy ones, of this process and its children."""
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            tick = os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            return None
        idle = fields[3] + fields[4]
        own = os.times()
        mine = own.user + own.system + own.children_user + own.children_system
        return sum(fields) / tick, (sum(fields) - idle) / tick, mine

    def others(self) -> float | None:
        """Between 0 and 1; None where the system does not say."""
        now = self._read()
        if now is None or self._start is None:
            return None
        total, used, mine = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, min(1.0, (used - mine) / total)) if total > 0 else 0.0

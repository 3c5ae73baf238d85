"""Measurements that need a process of their own: peak memory is a process's, and a large problem
leaves nothing behind.

``python -m rewire.app.bench.child TASK '{"argument": value}'`` prints its result as the last line,
in JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewire.app.errors import NotAvailable

__all__ = ["Memory", "measure"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory:
    """Resident memory of this process in bytes, without the pages of files.

    Those are the code of libraries, which the system drops and reads again at will: 40 MB of it
    would be 4 bytes for each of ten million connections.
    """

    @staticmethod
    def _read(key: str) -> int:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
        raise NotAvailable(f"this system's /proc does not tell {key}")

    def now(self) -> int:
        """Resident now."""
        return self._read("RssAnon")

    def peak(self) -> int:
        """Highest since `reset`. Reset shortly before: the pages of files are subtracted."""
        return self._read("VmHWM") - self._read("RssFile")

    def total(self) -> int:
        """Highest since `reset`, with everything."""
        return self._read("VmHWM")

    def reset(self) -> None:
        """Start the high-water mark at what is resident now."""
        _CLEAR.write_text("5")


def measure(
    task: str,
    arguments: dict[str, Any],
    *,
    threads: int,
    cpu_time: bool = False,
    timeout: float = 1800,
) -> dict[str, Any]:
    """Run one of `_tasks` in its own process. Raises `NotAvailable` where that cannot be done."""
    if not _STATUS.exists() or not _CLEAR.exists():
        raise NotAvailable("memory is measured through /proc, which this system does not have")
    folder = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    command = [
        sys.executable,
        "-m",
        "rewire.app.bench.child",
        task,
        json.dumps({"threads": threads, "cpu_time": cpu_time} | arguments),
    ]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotAvailable(f"not done in {timeout:.0f} s") from None
    if done.returncode < 0:
        raise NotAvailable(
            f"the process was ended by signal {-done.returncode}, probably for want of memory"
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotAvailable(f"the process failed: {last}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _tasks() -> dict[str, Callable[..., dict[str, Any]]]:
    from rewire.app.bench import large

    return {
        "training": large.training_memory,
        "contender": large.contender_memory,
        "point": large.point,
        "million": large.million,
        "wide": large.wide_epoch,
        "update": large.one_update,
    }


def _main() -> None:
    import torch

    task, arguments = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(arguments.pop("threads"))
    # Threads, allocator and operator tables are there before anything is counted.
    torch.ones(1_000_000).exp_().sum()
    clock = time.process_time if arguments.pop("cpu_time") else time.perf_counter
    result = _tasks()[task](Memory(), clock, **arguments)
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    _main()

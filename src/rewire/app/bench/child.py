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
from rewire.app.resident import Memory, can_measure

__all__ = ["measure"]


def measure(
    task: str,
    arguments: dict[str, Any],
    *,
    threads: int,
    cpu_time: bool = False,
    timeout: float = 1800,
) -> dict[str, Any]:
    """Run one of `_tasks` in its own process. Raises `NotAvailable` where that cannot be done."""
    if not can_measure():
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
    from rewire.app.bench import large, step_memory

    return {
        "training": large.training_memory,
        "contender": large.contender_memory,
        "point": large.point,
        "million": large.million,
        "wide": large.wide_epoch,
        "update": large.one_update,
        "step": step_memory.step_memory,
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

"""Kill -9 at random moments, then --resume: the run ends bit-identical to the one that was never interrupted.

Real processes and real SIGKILLs. Importing torch takes longer than the whole training run, so one server process
imports it once and forks a child for every command; the children are what is killed.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SERVER = """
import json, os, signal, sys, time
import rewire.cli, rewire.report, rewire.train.command, plotly.offline
import torch
import torch._dynamo  # the first optimizer of a process imports it: here, not once in every child
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    arguments, kill_after = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 70
        try:
            code = rewire.cli.run(arguments)
        finally:
            os._exit(code)
    deadline = time.perf_counter() + kill_after
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended and time.perf_counter() < deadline:
        time.sleep(0.0005)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

TRAIN = [
    "train", "--hidden", "40,20", "--density", "0.2", "--epochs", "6", "--batch-size", "10", "--lr", "0.3",
    "--lr-decay", "0.9", "--threads", "1",
]  # fmt: skip
KILLS = 20


class Server:
    """Runs commands in forked children."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, *arguments: str, kill_after: float = 100.0) -> int:
        """Run a command line, killed after so many seconds unless it ends before; returns the exit code."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([arguments, kill_after]) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must be the same: all files but the report, without the seconds."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    for part in (*metrics, result):
        del part["seconds"]
    result.pop("inference", None)  # milliseconds as well
    (tensors,) = folder.glob("checkpoint-*.safetensors")
    return {
        "model": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "checkpoint": hashlib.sha256(tensors.read_bytes()).hexdigest(),
        "config": (folder / "config.json").read_text(),
        "metrics": metrics,
        "result": result,
    }


def arguments_for(folder: Path, *more: str) -> list[str]:
    """What a user types next: --resume if the run had begun, else the whole command again."""
    if (folder / "config.json").exists():
        return ["train", "--resume", "--run-dir", str(folder)]
    return [*TRAIN, "--run-dir", str(folder), *more]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("method", "more"),
    [("deep-r", ("--checkpoint-every", "37")), ("set", ("--method", "set", "--momentum", "0.9"))],
    ids=["deep-r", "set"],
)
def test_killed_runs_end_as_if_never_killed(server: Server, tmp_path: Path, method: str, more) -> None:
    durations = []
    for name in ("whole", "whole again"):
        begin = time.perf_counter()
        assert server.run(*arguments_for(tmp_path / name, *more)) == 0
        durations.append(time.perf_counter() - begin)
    duration = min(durations)  # on a busy machine one of them may have had to wait
    expected = outcome(tmp_path / "whole")
    assert outcome(tmp_path / "whole again") == expected
    moments = random.Random(method)
    killed, resumed = 0, 0
    while killed < KILLS // 2:  # in each of the two runs
        folder = tmp_path / f"killed {killed}"
        code = server.run(*arguments_for(folder, *more), kill_after=moments.uniform(0, duration))
        while code == -signal.SIGKILL:
            killed += 1
            again = moments.random() < 0.4
            kill_after = moments.uniform(0, duration / 2) if again else 100.0
            resumed += (folder / "config.json").exists()
            code = server.run(*arguments_for(folder, *more), kill_after=kill_after)
        assert code == 0
        assert outcome(folder) == expected
        assert (folder / "report.html").exists()
        assert not list(folder.glob(".unfinished-*"))
    assert resumed >= KILLS // 4

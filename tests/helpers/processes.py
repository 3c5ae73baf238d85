"""Runs of the command line in processes of their own, without waiting for torch each time.

Importing torch takes longer than a whole training run of the tests, so one server process imports
it once and forks a child for every command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SERVER = """
import json, os, resource, signal, sys, time
import rewire.app.cli, rewire.__main__, rewire.app.report, rewire.app.train.command
import rewire.app.data.mnist
import torch
import torch._dynamo  # the first optimizer of a process imports it: here, not once in every child
torch.set_num_threads(1)
print("ready", flush=True)


def begin(command, memory, user, setup):
    told, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, told
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(write, 2)
        if memory:
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, resource.RLIM_INFINITY))
        if setup:
            exec(setup, {"command": command, "os": os, "sys": sys})
        if user:
            os.setuid(user)
        sys.argv = ["rewire", *command]
        rewire.__main__.main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 71
    finally:
        sys.stderr.flush()
        os._exit(code)


for line in sys.stdin:
    asked = json.loads(line)
    start = time.perf_counter()
    running = [begin(c, asked["memory"], asked["user"], asked["setup"]) for c in asked["commands"]]
    signals = [(start + after, number) for after, number in asked["signals"]]
    codes = {}
    while len(codes) < len(running):
        for child, _ in running:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
        while signals and time.perf_counter() >= signals[0][0]:
            _, number = signals.pop(0)
            for child, _ in running:
                if child not in codes:
                    os.kill(child, number)
        time.sleep(0.0005)
    texts = []
    for _, told in running:
        with os.fdopen(told, "rb") as file:
            texts.append(file.read().decode())
    answer = [[codes[child], text] for (child, _), text in zip(running, texts)]
    print(json.dumps([answer, time.perf_counter() - start]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (negative: the signal that killed it) and all that it wrote to
    stderr.
    """

    code: int
    told: str


class Server:
    """Runs commands in forked children."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.seconds = 0.0  # that the last commands took
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def together(
        self,
        commands: Sequence[Sequence[str]],
        *,
        signals: Sequence[tuple[float, int]] = (),
        memory: int = 0,
        user: int = 0,
        setup: str = "",
    ) -> list[Ended]:
        """Run commands at once.

        signals: (seconds, number), in that order, for all of them. memory: bytes that each may take
            beyond what there
        is when it begins. user: whose rights it has. setup: Python code that goes before.
        """
        assert self.process.stdin is not None
        request: dict[str, Any] = {
            "commands": commands,
            "signals": signals,
            "memory": memory,
            "user": user,
        }
        self.process.stdin.write(json.dumps(request | {"setup": setup}) + "\n")
        self.process.stdin.flush()
        answer, self.seconds = json.loads(self._line())
        return [Ended(code, told) for code, told in answer]

    def run(self, *command: str, **more: Any) -> Ended:
        """Run one command; see `together`."""
        return self.together([command], **more)[0]

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

"""Pieces of Python in processes of their own, without importing torch for each of them.

Importing torch takes longer than most of the pieces run. One process imports it, without rewire
and its native library, and forks a child for every piece.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = """
import json, os, sys, traceback
import numpy, hypothesis, torch
print("ready", flush=True)
for line in sys.stdin:
    code, folder, environment, paths, files = json.loads(line)
    child = os.fork()
    if not child:
        ended = 1
        try:
            for number, file in enumerate(files, 1):
                os.dup2(os.open(file, os.O_WRONLY), number)
            os.chdir(folder)
            os.environ.update(environment)
            sys.path[:0] = paths
            exec(compile(code, "<piece>", "exec"), {"__name__": "__main__"})
            ended = 0
        except SystemExit as error:
            ended = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    atexit.register(server.communicate)  # which closes its input: it ends
    return server


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in this folder, with the rewire of this process, the helpers of the tests, and
    these environment variables besides those there are.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        for file in files:
            file.touch()
        variables = {**os.environ, **environment}
        asked = code, os.getcwd(), variables, [p for p in paths if p], [*map(str, files)]
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        ended = int(server.stdout.readline())
        out, err = (file.read_text() for file in files)
    return subprocess.CompletedProcess(code, ended, out, err)

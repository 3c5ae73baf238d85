"""Kill -9 at random moments, then --resume: the run ends bit-identical to the one that was never
interrupted.

Real processes and real SIGKILLs, over ten methods. `REWIRE_KILLS` says how many in all (before a
release: 200).
"""

import hashlib
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import Server

KILLS = int(os.environ.get("REWIRE_KILLS", "10"))

TRAIN = [
    "train",
    "--hidden",
    "30,20",
    "--density",
    "0.2",
    "--epochs",
    "2",
    "--batch-size",
    "50",
    "--lr-decay",
    "0.9",
    "--threads",
    "1",
]
METHODS: dict[str, tuple[str, ...]] = {
    "deep-r": ("--checkpoint-every", "7", "--optimizer", "sgd", "--lr", "0.3"),
    "set": ("--momentum", "0.9"),
    "rigl": ("--set", "every=10", "--optimizer", "adam"),
    "snfs": ("--momentum", "0.9", "--checkpoint-every", "11"),
    "itop": ("--set", "every=10"),
    "gmp": (),
    "ctre": ("--momentum", "0.9"),
    "codaset": ("--optimizer", "adamw"),
    "halo": (),
    "ternary": ("--checkpoint-every", "9"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must be the same: all files but the report and the sums, without the
    seconds.
    """
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


def arguments_for(folder: Path, method: str) -> list[str]:
    """What a user types next: --resume if the run had begun, else the whole command again."""
    if (folder / "config.json").exists():
        return ["train", "--resume", "--run-dir", str(folder)]
    return [*TRAIN, "--run-dir", str(folder), "--method", method, *METHODS[method]]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("method", METHODS)
def test_killed_runs_end_as_if_never_killed(server: Server, tmp_path: Path, method: str) -> None:
    ended = server.run(*arguments_for(tmp_path / "whole", method))
    assert (ended.code, ended.told) == (0, "")
    duration = server.seconds
    expected = outcome(tmp_path / "whole")
    assert (
        sum(sum(line["dropped"]) for line in expected["metrics"])
        + expected["result"]["connections"]
        > 0
    )
    moments = random.Random(method)
    killed = resumed = runs = 0
    while killed < max(KILLS // len(METHODS), 1):
        # a new one each time: some are finished before they are killed
        folder = tmp_path / (f"killed {runs}")
        runs += 1
        code, kill_after = -signal.SIGKILL, moments.uniform(0, duration)
        while code == -signal.SIGKILL:
            resumed += (folder / "config.json").exists()
            ended = server.run(
                *arguments_for(folder, method), signals=[(kill_after, signal.SIGKILL)]
            )
            code = ended.code
            killed += code == -signal.SIGKILL
            kill_after = moments.uniform(0, duration / 2) if moments.random() < 0.4 else 1000.0
        assert (code, ended.told) == (0, "")
        assert outcome(folder) == expected
        assert (folder / "report.html").exists()
        assert not [p for p in folder.glob(".unfinished-*") if "report" not in p.name]
    print(f"{method}: {killed} kills, {resumed} of them resumed, a run takes {duration:.1f} s")

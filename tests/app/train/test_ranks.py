"""`torchrun -m rewire train`: two real processes, one of them killed and started again; and runs
that go on with another number of processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rewire.app.train.ranks import Ranks, connect

TRAIN = ["-m", "rewire", "train", "--data", "digits", "--threads", "1", "--density", "0.05"]
SET = [*TRAIN, "--method", "set", "--set", "every=7", "--set", "until=60", "--epochs", "10"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ALONE = ["TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"]

pytestmark = [
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available() or sys.platform != "linux",
        reason="needs gloo on Linux",
    )
]


def begin(*arguments: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ALONE}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        out, _ = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, out
    return out


def wait_for_epochs(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 180
    metrics = folder / "metrics.jsonl"
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get on")


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started, in order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found = dict(v.split(b"=", 1) for v in variables if b"=" in v)
        if b"RANK" in found:
            ranks[int(found[b"RANK"])] = child
    return [ranks[rank] for rank in sorted(ranks)]


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, without seconds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    for part in (*lines, result):
        del part["seconds"]
    model = {k: v.numpy().tobytes() for k, v in load_file(folder / "model.safetensors").items()}
    return {"lines": lines, "result": result, "model": model}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_again_and_the_run_ends_the_same(
    tmp_path: Path, rank: int, whole: Path
) -> None:
    folder = tmp_path / "killed"
    place = ["--checkpoint-every", "5", "--run-dir", str(folder)]
    process = begin(*TORCHRUN, "--max-restarts", "1", *SET, *place)
    wait_for_epochs(folder, 2)
    os.kill(workers(process)[rank], signal.SIGKILL)
    out = end(process)
    assert out.count("test accuracy") == 1  # one rank talks
    killed, uninterrupted = outcome(folder), outcome(whole)
    assert killed["lines"] == uninterrupted["lines"]
    assert killed["model"] == uninterrupted["model"]
    assert (folder / "report.html").exists()
    assert [line["epoch"] for line in killed["lines"]] == list(range(1, 11))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("ranks") / "whole"
    end(begin(*TORCHRUN, *SET, "--run-dir", str(folder)))
    return folder


def pairs(file: Path) -> set[tuple[int, int]]:
    """The connections of the first layer in a file of tensors."""
    state = load_file(file)
    (key,) = [k for k in state if k.endswith("0.weight.rows")]
    rows, cols = (state[key.removesuffix("rows") + part].tolist() for part in ("rows", "cols"))
    return set(zip(rows, cols, strict=True))


@pytest.mark.slow
def test_a_run_goes_on_in_one_process_with_the_same_topology(tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    process = begin(*TORCHRUN, *SET, "--run-dir", str(folder))
    wait_for_epochs(folder, 5)  # no updates any more
    for worker in workers(process):
        os.kill(worker, signal.SIGKILL)
    end(process, code=1)
    assert not (folder / "result.json").exists()
    # a run that was killed may have left the tensors of two checkpoints
    before = pairs(folder / json.loads((folder / "checkpoint.json").read_text())["file"])
    out = end(begin("-m", "rewire", "train", "--resume", "--run-dir", str(folder)))
    assert "test accuracy" in out
    assert pairs(folder / "model.safetensors") == before
    assert len(outcome(folder)["lines"]) == 10


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_more_can_take_over(
    tmp_path: Path, whole: Path
) -> None:
    """Batches are those of one process: sums are only rounded in another order."""
    folder = tmp_path / "single"
    process = begin(*SET, "--run-dir", str(folder))
    wait_for_epochs(folder, 3)
    process.send_signal(signal.SIGTERM)
    end(process, code=143)
    out = end(begin(*TORCHRUN, "-m", "rewire", "train", "--resume", "--run-dir", str(folder)))
    assert "test accuracy" in out
    first, other = outcome(folder), outcome(whole)
    losses = [[line["train_loss"] for line in run["lines"]] for run in (first, other)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.1, atol=0.02)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.01)
    accuracy = [run["result"]["test_accuracy"] for run in (first, other)]
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.03)


def test_the_run_directory_must_be_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rewire.app.cli import program

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert program.run(["train", "--data", "digits"]) == 2
    assert "give --run-dir FOLDER" in capsys.readouterr().err


def test_parts_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(7, 2), torch.arange(7)
    for count in (1, 2, 3, 9):
        parts = [Ranks(rank, count).part(x, y) for rank in range(count)]
        assert torch.equal(torch.cat([part[1] for part in parts]), y)
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    ranks = connect()
    assert (ranks.count, ranks.first, ranks.several, ranks.restarts) == (1, True, False, 0)
    assert ranks.largest(3) == 3
    assert ranks.of_first("word") == "word"

"""`rewire bench` as users meet it: what it writes, and one line for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rewire.app import cli
from rewire.app.bench import machine, sections, targets
from rewire.app.bench import run as command
from rewire.app.bench.curves import Setting
from rewire.app.bench.verdict import Figure, at_least, missing

TINY = Setting(threads=1, seconds=0.0, rounds=2, quick=True)


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "pin", lambda threads: None)  # the test process keeps its cores


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--layer", "4096"],
            "--layer: given '4096', allowed is OUTPUTSxINPUTS such as 4096x1024, both at least 1",
        ),
        (["--layer", "0x8"], "--layer: given '0x8'"),
        (
            ["--layer", "8x8", "--density", "0"],
            "--density: given '0', allowed is a number above 0 and up to 1",
        ),
        (["--layer", "8x8", "--density", "1.5"], "--density: given '1.5'"),
        (["--layer", "8x8", "--density", "nan"], "--density: given 'nan'"),
        (["--layer", "8x8", "--density", "much"], "--density: given 'much'"),
        (
            ["--layer", "8x8", "--batch", "0"],
            "--batch: given '0', allowed is a whole number from 1",
        ),
        (["--layer", "8x8", "--threads", "100000"], "--threads: given '100000'"),
        (["--targets", "p1,p99"], "--targets: there is no 'p99'; allowed are p1, p2"),
        (["--targets", "p1", "--layer", "8x8"], "--targets, --layer and --model are different"),
        (["--density", "0.1"], "--density belongs to --layer or --model"),
        (["--targets", "p1", "--cpu-time", "--threads", "2"], "--cpu-time counts one thread"),
        (["--memory"], "--memory belongs to --layer"),
        (["--input", "3"], "--input belongs to --model"),
        (["--compare", "none.json"], "--compare: cannot read none.json"),
        (["--model", "mlp", "--input", "3x-4"], "--input: given '3x-4'"),
        (["--layer", "1000000x1000000", "--density", "1"], "choose a lower --density"),
        (["--nonsense"], "No such option"),
    ],
)
def test_errors(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert line in err


def test_an_unwritable_folder_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.run(["bench", "--targets", "p8", "--out", "file/below"]) == 2
    assert "cannot read or write file/below" in capsys.readouterr().err


def test_a_layer_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sections, "DENSITIES", (0.5,))
    monkeypatch.setattr(command, "Setting", lambda *_, **__: TINY)
    assert (
        cli.run(["bench", "--layer", "24x16", "--density", "0.25", "--batch", "4", "--out", "here"])
        == 0
    )
    out = capsys.readouterr().out
    assert "24 x 16, density 0.25, batch 4" in out
    saved = json.loads(Path("here/bench.json").read_text())
    assert [row["kind"] for row in saved["layer"]["rows"]][:1] == ["dense"]
    assert saved["layer"]["curve"]["densities"] == [0.25, 0.5]


def test_a_layer_too_large_for_a_dense_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 100_000)
    found = sections.layer(TINY, 100, 100, 0.01, 2, memory=False, progress=lambda _: None)
    assert [row["kind"] for row in found["rows"]] == ["rewire", "rewire feature-major"]
    assert all(row["speedup"] is None for row in found["rows"])
    run = command.Run(out=Path("here"), names=["p8"], setting=TINY, console=Console(quiet=True))
    run.layer((100, 100), 0.01, 2, memory=False)
    assert "rewire feature-major" in Path("here/bench.html").read_text()


def _target(name: str, *figures: Any, data: dict[str, Any] | None = None) -> targets.Target:
    return targets.Target(name, f"title <of> {name}", lambda setting: (list(figures), data or {}))


def test_a_whole_run_is_saved_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [{"connections": k, "seconds": k * 1e-8, "bytes": 32 * k} for k in (10, 100)]
    mine = {
        "p1": _target("p1", at_least("fast", 2.0, 1.0), at_least("slow", 0.5, 1.0)),
        "p2": _target("p2", at_least("fast", 2.0, 1.0), missing("other", "not installed")),
        "p10": _target(
            "p10", at_least("line", 1.0, 0.99), data={"points": points, "size": 9, "batch": 1}
        ),
    }
    monkeypatch.setattr(targets, "TARGETS", mine)
    monkeypatch.setattr(sections, "QUICK_GRID", ((12, 8, 2),))
    wide = {
        "data": "leukemia",
        "batch": 2,
        "neurons": 10,
        "connections": 20,
        "planned_steps": 3,
        "epoch_seconds": 1.0,
        "update_seconds": 0.1,
        "build_seconds": 0.1,
        "peak": 2**30,
    }
    monkeypatch.setattr(sections, "wide", lambda *_: wide)
    console = Console(record=True, width=200, file=open("log.txt", "w"))  # noqa: SIM115
    command.Run(out=Path("here"), setting=TINY, console=console).everything()
    console.file.close()
    saved = json.loads(Path("here/bench.json").read_text())
    assert set(saved) == {
        "format",
        "machine",
        "ceilings",
        "earlier",
        "setting",
        "targets",
        "grid",
        "layer",
        "model",
        "wide",
        "others",
        "seconds",
    }
    assert saved["format"] == command.FORMAT
    assert set(saved["machine"]) >= {
        "cpu",
        "cores",
        "threads",
        "kernels",
        "torch",
        "rewire",
        "load_average",
        "openmp",
    }
    assert [(b["name"], b["status"]) for b in saved["targets"]] == [
        ("p1", "missed"),
        ("p2", "in part"),
        ("p10", "met"),
    ]
    figure = saved["targets"][0]["figures"][0]
    assert set(figure) == {*Figure.__dataclass_fields__, "met", "margin"}
    assert set(saved["grid"][0]) == {
        "inputs",
        "outputs",
        "batch",
        "densities",
        "seconds",
        "quartiles",
        "best",
        "rounds",
        "break_even",
    }
    text = console.export_text()
    assert "nearest to its target" in text
    assert "10 neurons" in text
    page = Path("here/bench.html").read_text()
    assert "title &lt;of&gt; p1" in page
    assert "http" not in page.split("<main>")[1].split("</main>")[0]  # needs nothing from elsewhere


def test_a_model_run_is_saved_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [
        {
            "name": "0",
            "layer": "linear 5 x 6",
            "rows": 3,
            "verdict": "sparse",
            "dense_seconds": 2e-3,
            "sparse_seconds": 1e-3,
            "speedup": 2.0,
            "low": 1.9,
            "high": 2.1,
            "density": 0.1,
            "break_even": 0.5,
            "note": "",
        },
        {
            "name": "1",
            "layer": "conv 3 x 3",
            "rows": 3,
            "verdict": "not measured",
            "note": "only others are",
        },
    ]
    found = {"model": "mine", "density": 0.1, "batch": 3, "input": [6], "layers": layers}
    monkeypatch.setattr(sections, "model", lambda *_: found)
    run = command.Run(out=Path("here"), setting=TINY, console=Console(quiet=True))
    run.model("mine", None, 0.1, 3)
    assert json.loads(Path("here/bench.json").read_text())["model"] == found
    page = Path("here/bench.html").read_text()
    assert "not measured (only others are)" in page
    assert "mine, density 0.1" in page


def test_load_of_others_is_a_share() -> None:
    load = machine.Load()
    share = load.others()
    assert share is None or 0.0 <= share <= 1.0

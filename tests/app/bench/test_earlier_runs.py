"""`rewire bench --compare`: better, worse, or within noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewire.app.bench import compare
from rewire.app.bench.verdict import Figure
from rewire.app.errors import BenchError

FASTER = Figure("over dense", 4.0, "x", ">=", 2.0, 3.9, 4.1)
SMALLER = Figure("bytes", 30.0, "B", "<=", 36.0)


def _run(*figures: Figure, cpu: str = "A", seconds: float = 1e-3) -> dict[str, Any]:
    curve = {
        "outputs": 8,
        "inputs": 4,
        "batch": 2,
        "densities": [0.1],
        "seconds": {"rewire": [seconds], "dense": [2e-3]},
        "quartiles": {"rewire": [(0.98 * seconds, 1.02 * seconds)], "dense": [(1e-3, 3e-3)]},
    }
    return {
        "format": 3,
        "machine": {
            "cpu": cpu,
            "threads": 1,
            "kernels": "avx2",
            "torch": "2",
            "others": {},
            "started": "2026-01-01",
        },
        "setting": {"quick": False},
        "targets": [{"name": "p1", "figures": [figure.to_json() for figure in figures]}],
        "grid": [curve],
        "layer": None,
        "model": None,
    }


def _changed(figure: Figure, **more: Any) -> Figure:
    return Figure(**(vars(figure) | more))


def _verdicts(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    return {row[0]: row[-1] for row in compare.sheet(old, new).rows}


def test_verdicts() -> None:
    old = _run(FASTER, SMALLER)
    assert set(_verdicts(old, old).values()) == {"within noise"}
    new = _run(
        _changed(FASTER, value=5.0, low=4.9, high=5.1), _changed(SMALLER, value=40.0), seconds=9e-4
    )
    assert _verdicts(old, new) == {
        "P1: over dense": "better",
        "P1: bytes": "worse",
        "8 x 4, batch 2, 0.1: rewire": "better",
        "8 x 4, batch 2: dense": "within noise",
    }
    assert (
        _verdicts(old, _run(FASTER, SMALLER, seconds=5e-4))["8 x 4, batch 2, 0.1: rewire"]
        == "better"
    )
    worse = _run(_changed(FASTER, value=3.0, low=2.9, high=3.1), SMALLER)
    assert _verdicts(old, worse)["P1: over dense"] == "worse"
    touching = _run(_changed(FASTER, value=3.8, low=3.7, high=3.95), SMALLER)
    assert _verdicts(old, touching)["P1: over dense"] == "within noise"


def test_only_what_both_have() -> None:
    none = _changed(FASTER, value=None, low=None, high=None)
    assert "P1: over dense" not in _verdicts(_run(FASTER), _run(none, SMALLER))
    assert "P1: bytes" not in _verdicts(_run(FASTER), _run(none, SMALLER))


def test_another_machine_is_named() -> None:
    old, new = _run(FASTER), _run(FASTER, cpu="B")
    assert "differ" not in compare.sheet(old, old).note
    assert "the runs differ in the processor" in compare.sheet(old, new).note


def test_layers_of_the_same_model_only() -> None:
    row = {"name": "0", "layer": "linear 5 x 6", "rows": 3, "speedup": 2.0, "low": 1.9, "high": 2.1}
    model = {"model": "mlp", "density": 0.1}
    old = _run() | {"model": model | {"layers": [row, {"name": "1", "verdict": "not measured"}]}}
    better = row | {"speedup": 3.0, "low": 2.9, "high": 3.1}
    name = "mlp, 0 (linear 5 x 6, 3 rows, 0.1): dense / sparse"
    assert _verdicts(old, old | {"model": model | {"layers": [better]}})[name] == "better"
    for other in (model | {"density": 0.5}, model | {"model": "mine"}):
        assert not [
            n for n in _verdicts(old, old | {"model": other | {"layers": [row]}}) if "/" in n
        ]


def test_a_file_that_lacks_something_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    whole = _run(FASTER, SMALLER)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(whole))
    assert compare.read(path, 3)["format"] == 3
    for damaged in (
        {name: whole[name] for name in whole if name != "targets"},
        whole | {"machine": None},
        whole | {"targets": [{"name": "p1"}]},
        whole | {"grid": [whole["grid"][0] | {"densities": [0.1, 0.2]}]},
        whole | {"grid": [whole["grid"][0] | {"seconds": {"rewire": ["fast"]}}]},
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(BenchError, match="is no whole bench"):
            compare.read(path, 3)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "cannot read"),
        ("[]", "of format None"),
        (json.dumps({"format": 2}), "of format 2, and this version compares format 3"),
    ],
)
def test_files_that_are_no_results(content: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(content)
    with pytest.raises(BenchError, match=line):
        compare.read(tmp_path / "old.json", 3)

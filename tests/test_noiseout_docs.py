"""docs/noiseout.md: its example runs, and its table is that of docs/results/noiseout.json."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rewire

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "noiseout.md").read_text()
REPORT = json.loads((ROOT / "docs" / "results" / "noiseout.json").read_text())


def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, imported from its file (dataclasses look their module up by name)."""
    spec = importlib.util.spec_from_file_location("noiseout_benchmark", ROOT / "benchmarks" / "noiseout.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "noiseout_benchmark", module)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    assert benchmark(monkeypatch).table(REPORT) in PAGE


def test_counts_are_those_of_the_networks() -> None:
    """Parameters and shares follow from the neurons, by the formulas of the paper's two networks."""
    for run in (r for runs in REPORT["networks"]["lenet-300-100"]["results"].values() for r in runs):
        a, b = run["neurons"]
        assert run["parameters"] == 784 * a + a + a * b + b + 10 * b + 10
        assert run["removed"] == pytest.approx(100 * (1 - run["parameters"] / 266_610))
    for run in (r for runs in REPORT["networks"]["lenet-5"]["results"].values() for r in runs):
        assert run["parameters"] == 10_080 + 1163 * run["neurons"][0] + 10
        assert run["removed"] == pytest.approx(100 * (1 - run["parameters"] / 605_546))


def test_the_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    loader = [(torch.randn(10, 6), torch.randint(0, 3, (10,))) for _ in range(3)]
    names: dict[str, Any] = {
        "torch": torch, "rewire": rewire, "model": model, "loader": loader, "epochs": 2,
        "optimizer": torch.optim.Adam(model.parameters()), "validation_accuracy": lambda m: 1.0,
    }  # fmt: skip
    exec(code[1], names)
    assert names["model"][0].out_features == 1

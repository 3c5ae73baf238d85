"""The examples run, and reach what an example should."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from rewire.methods.core import registry

EXAMPLES = Path(__file__).parents[2] / "examples"
REACHED = {  # percent; what is left is for another processor's rounding
    "a_method_of_your_own.py": 60,
    "mnist_in_30_lines.py": 85,
    "noiseout_on_a_trained_network.py": 85,
    "sparse_resnet.py": 85,
    "sparse_transformer.py": 80,
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples have a registry of their own and a command line without arguments."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr("sys.argv", ["example"])


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == REACHED.keys()
    assert [path.name for path in EXAMPLES.glob("*.ipynb")] == ["tour.ipynb"]


@pytest.mark.parametrize("name", REACHED)
def test_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = re.findall(r"accuracy .*?([\d.]+) %", capsys.readouterr().out)
    assert float(printed[-1]) >= REACHED[name]
    if name.startswith("noiseout"):
        assert names["model"][0].out_features < 100


def test_notebook_runs() -> None:
    """Its cells in order, as Python: none has a command that only Jupyter knows."""
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    assert names["accuracies"]["set"] > names["accuracies"]["static"]

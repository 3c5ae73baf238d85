"""docs/differentiable.md shows what benchmarks/differentiable.py wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_tables_are_what_was_measured() -> None:
    text = (DOCS / "differentiable.md").read_text()
    measured = json.loads((DOCS / "results" / "differentiable.json").read_text())
    assert set(measured) == {"channels", "depth", "heads"}
    rows = re.findall(
        r"^\| (\w+) \| ([\d.]+) \| ([\d, /]+) \| ([\d,]+) \| ([\d,]+) \| (\d\d\.\d) % \|$", text, re.MULTILINE
    )
    expected = []
    for name, experiment in measured.items():
        full = next(run["components"] for run in experiment["runs"] if run["components"])
        for run in experiment["runs"]:
            components = run["components"] or {key: [every, every] for key, (_, every) in full.items()}
            on = ", ".join(f"{alive} / {every}" for alive, every in components.values())
            size = f"{run['parameters']:,}", f"{run['multiply_adds']:,}"
            expected.append((name, f"{run['strength']:g}", on, *size, f"{100 * run['test_accuracy']:.1f}"))
    assert rows == expected


def test_structure_was_learned() -> None:
    """Each experiment has a run with far fewer components at nearly the accuracy of the whole network."""
    measured = json.loads((DOCS / "results" / "differentiable.json").read_text())
    for name, most_lost in (("channels", 0.035), ("depth", 0.005), ("heads", 0.005)):
        whole, *gated = measured[name]["runs"]
        small = min(
            (r for r in gated if whole["test_accuracy"] - r["test_accuracy"] <= most_lost),
            key=lambda r: r["multiply_adds"],
        )
        assert small["multiply_adds"] < 0.9 * whole["multiply_adds"], name
        assert abs(small["test_accuracy"] - small["test_accuracy_before_finalize"]) <= 1e-3

"""docs/differentiable.md shows what benchmarks/differentiable.py wrote, and its example runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "differentiable.md").read_text()
MEASURED: dict[str, Any] = json.loads((DOCS / "results" / "differentiable.json").read_text())


def arms(name: str) -> dict[tuple[float, float], list[dict[str, Any]]]:
    """Runs of an experiment by (scale, strength), a run for each seed."""
    found: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for run in MEASURED[name]["runs"]:
        found.setdefault((run["scale"], run["strength"]), []).append(run)
    return found


def accuracy(runs: list[dict[str, Any]]) -> float:
    return mean(run["test_accuracy"] for run in runs)


def rows() -> list[str]:
    """The lines of the table: means over seeds."""
    lines = []
    for name in MEASURED:
        gated = next(runs for (_, strength), runs in arms(name).items() if strength)
        whole = {key: every for key, (_, every) in gated[0]["components"].items()}
        for (scale, strength), runs in arms(name).items():
            network = (
                (f"gates, {strength:g}")
                if strength
                else "whole"
                if scale == 1
                else f"{scale:g} of it, by hand"
            )

            def left(key: str, runs: list = runs) -> float:  # type: ignore[type-arg]
                return mean(run["components"][key][0] for run in runs)

            on = [
                f"{left(key) if strength else scale * every:.3g} / {every}"
                for key, every in whole.items()
            ]
            size, cost = (
                f"{mean(run[key] for run in runs):,.0f}" for key in ("parameters", "multiply_adds")
            )
            each = ", ".join(f"{100 * run['test_accuracy']:.1f}" for run in runs)
            score = f"{100 * accuracy(runs):.1f} %"
            lines.append(
                f"| {name} | {network} | {', '.join(on)} | {size} | {cost} | {score} | {each} |"
            )
    return lines


def test_table_is_what_was_measured() -> None:
    assert set(MEASURED) == {"channels", "depth", "heads"}
    assert re.findall(r"^\| (?:channels|depth|heads) \|.*$", TEXT, re.MULTILINE) == rows()


def test_heads_that_went_are_counted() -> None:
    gone = [
        sum(every - on for on, every in run["components"].values())
        for run in arms("heads")[1, 0.01]
    ]
    assert sorted(gone) == [8, 9]
    assert "Eight or nine heads of sixteen go" in TEXT


@pytest.mark.parametrize(
    ("name", "most_lost", "most_left"),
    [("channels", 0.02, 0.4), ("depth", 0.005, 0.6), ("heads", 0.005, 0.8)],
)
def test_structure_was_learned(name: str, most_lost: float, most_left: float) -> None:
    """An arm is much smaller at nearly the accuracy of the whole network; taking out what is off
    changes nothing.
    """
    found = arms(name)
    whole = found[1, 0]
    small = [
        runs
        for (_, strength), runs in found.items()
        if strength and accuracy(whole) - accuracy(runs) <= most_lost
    ]
    assert (
        min(mean(run["parameters"] for run in runs) for runs in small)
        < most_left * whole[0]["parameters"]
    )
    for run in MEASURED[name]["runs"]:
        if run["strength"]:
            assert abs(run["accuracy_after"] - run["accuracy_before"]) <= 1e-3

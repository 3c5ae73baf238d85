"""docs/speed.md shows what `rewire bench` measured, line by line."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("speed_page", ROOT / "benchmarks" / "speed_page.py")
assert SPEC is not None
assert SPEC.loader is not None
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)
RESULTS: dict[str, Any] = json.loads((ROOT / "docs" / "results" / "bench.json").read_text())
LINES = (ROOT / "docs" / "speed.md").read_text().splitlines()


@pytest.mark.parametrize("part", page.PARTS, ids=lambda part: part.__name__)
def test_tables_are_those_of_the_run(part):
    expected = part(RESULTS)
    start = LINES.index(expected[0])
    assert LINES[start : start + len(expected)] == expected


def test_the_count_of_targets_that_are_met():
    figures = [
        f for target in RESULTS["targets"] for f in target["figures"] if f["target"] is not None
    ]
    met = sum(f["met"] for f in figures)
    assert any(f"{met} of {len(figures)} figures with a target are met" in line for line in LINES)


def test_a_full_run_of_a_quiet_machine():
    assert not RESULTS["setting"]["quick"]
    assert not RESULTS["setting"]["cpu_time"]
    assert [target["name"] for target in RESULTS["targets"]] == [f"p{i}" for i in range(1, 17)]
    assert RESULTS["others"] < 0.05


def test_readme_says_what_was_measured():
    assert page.headline(RESULTS) in (ROOT / "README.md").read_text()


def test_readme_says_what_p1_measured() -> None:
    """Other targets have figures of the same names."""
    text = (ROOT / "README.md").read_text()
    (p1,) = (target for target in RESULTS["targets"] if target["name"] == "p1")
    for density in ("10", "5", "1"):
        found = [
            f["value"]
            for f in p1["figures"]
            if f["name"].endswith(f", {density}%, 128 rows, over nn.Linear")
        ]
        assert len(found) == 2
        assert f"{page.between(found)} times at {density} %" in text


def test_the_guide_says_what_p1_measured() -> None:
    guide = (ROOT / "docs" / "guides" / "when_is_sparse_faster.md").read_text()
    rows = re.findall(r"^\| (\d+ x \d+) \| (\d+%) \| ([\d.]+) ", guide, re.MULTILINE)
    assert len(rows) == 6
    (p1,) = (target for target in RESULTS["targets"] if target["name"] == "p1")
    figures = {f["name"]: page.tables.number(f["value"]) for f in p1["figures"]}
    for size, density, times in rows:
        assert figures[f"{size}, {density}, 128 rows, over nn.Linear"] == times

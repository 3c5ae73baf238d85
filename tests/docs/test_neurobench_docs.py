"""The table of the page on hardware budgets is what the script in `benchmarks` measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

import rewire

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location(
    "neurobench_keywords", ROOT / "benchmarks" / "neurobench_keywords.py"
)
assert SPEC is not None
assert SPEC.loader is not None
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)
REPORT: dict[str, Any] = json.loads((ROOT / "docs" / "results" / "neurobench.json").read_text())
PAGE = (ROOT / "docs" / "guides" / "hardware_budgets.md").read_text()


def test_the_table_is_that_of_the_run() -> None:
    assert script.table(REPORT) in PAGE


def test_the_page_says_how_it_was_run() -> None:
    text = " ".join(PAGE.split())
    assert f"a fan-in of at most {REPORT['fan_in']}, {REPORT['epochs']} epochs" in text
    assert f"a density of {REPORT['density']:.0%}".replace("%", " %") in text
    assert {len(runs) for runs in REPORT["results"].values()} == {2}
    model = script.network((100, 39), 10)
    dense = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv1d | torch.nn.Linear)]
    assert f"{sum(w.numel() for w in dense):,} weights" in text
    assert model(torch.randn(2, 100, 39)).shape == (2, 10)


def test_the_limits_were_kept_and_both_counts_agree_but_for_zeros() -> None:
    for method, runs in REPORT["results"].items():
        for run in runs if method != "dense" else ():
            assert run["fan_in"] <= REPORT["fan_in"]
            assert 0 <= run["connection_sparsity"] - run["own_count"] < 0.005
            weights = rewire.sparsify(
                script.network((100, 39), 10), density=REPORT["density"], distribution="uniform"
            )
            k = sum(w.connections for _, w in rewire.sparse_weights(weights))
            assert run["connections"] == k

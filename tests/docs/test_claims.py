"""docs/claims.md has every recipe, with what `benchmarks/claims.py` found for it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rewire.app.studies import results
from rewire.app.studies.command import recipe_names

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
ROOT = Path(__file__).parents[2]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


claims = _module(ROOT / "benchmarks" / "claims.py")
generate = _module(ROOT / "docs" / "generate.py")
SUMMARY: dict[str, Any] = {
    "runs": {"ended": 18, "planned": 20},
    "claims": [
        {"claim": "a is good", "found": 97.123, "bound": 96.0, "holds": True},
        {"claim": "b is better", "found": -1.5, "bound": 0.0, "holds": False},
        {"claim": "c is best", "found": None, "bound": 0.0, "holds": None},
    ],
    "table": "| method | accuracy |\n| --- | --- |\n| a | 97.1 |\n",
}


def test_every_recipe_has_its_place() -> None:
    page = generate.claims_page()
    for name in recipe_names():
        assert f"rewire compare --recipe {name}`" in page
        assert f"{{#{name}}}" in page


def test_results_are_kept_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "docs" / "results" / "claims")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / results.SUMMARY).write_text(json.dumps(SUMMARY))
    claims.keep("ternary-mnist", tmp_path / "study")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    page = generate.claims_page()
    assert "| [ternary-mnist](#ternary-mnist) | 1 of 3, 1 not known yet | 18 of 20 |" in page
    assert "- holds: a is good (found 97.12)" in page
    assert "- **missed**: b is better (found -1.50)" in page
    assert "- not known yet: c is best\n" in page
    assert SUMMARY["table"] in page


def test_committed_results_are_of_recipes_there_are() -> None:
    for path in (ROOT / "docs" / "results" / "claims").glob("*.json"):
        found = json.loads(path.read_text())
        assert found["recipe"] == path.stem
        assert path.stem in recipe_names()
        assert found["runs"]["ended"] > 0

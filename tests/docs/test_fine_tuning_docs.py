"""docs/sparse_fine_tuning.md: its table and figures are those of docs/results/adapt.json, and what
the benchmark compares is as large.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sparse_fine_tuning.md").read_text()
TEXT = " ".join(PAGE.split())
REPORT = json.loads((ROOT / "docs" / "results" / "adapt.json").read_text())
RESULTS: dict[str, Any] = REPORT["results"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, imported from its file."""
    spec = importlib.util.spec_from_file_location("adapt", ROOT / "benchmarks" / "adapt.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "adapt", module)
    spec.loader.exec_module(module)
    return module


def mean(name: str) -> float:
    return statistics.mean(RESULTS[name]["bits"])


def test_the_table_is_the_results(benchmark: Any) -> None:
    assert benchmark.table(REPORT) in PAGE
    assert all(len(found["bits"]) == 3 for found in RESULTS.values())
    base = REPORT["base"]
    own, other = base["own"], base["other"]
    assert f"{own:.2f} bits a character of its own kind of text and {other:.2f} of" in TEXT


def test_all_adapters_train_as_many_numbers_as_lora(benchmark: Any) -> None:
    model = benchmark.network(benchmark.SIZE)
    blocks, width = benchmark.SIZE
    of_a_block = (width + 3 * width) + 2 * width + 2 * (width + 4 * width)
    expected = benchmark.RANK * blocks * of_a_block
    assert benchmark.trained_by_lora(model) == expected
    adapters = {name: found["trained"] for name, found in RESULTS.items() if "full" not in name}
    assert set(adapters.values()) == {expected}
    contender = benchmark.Contender("RigL", model, 1e-3, 0)
    assert contender.trained == expected
    before = contender.model.blocks[0].up.weight.detach().clone()
    batch = torch.randint(0, 90, (2, benchmark.STEPS + 1))
    contender.step(batch)
    assert torch.equal(contender.model.blocks[0].up.weight, before)


def test_rates_were_not_at_the_edge_of_what_was_tried() -> None:
    for name, found in RESULTS.items():
        tried = {float(rate): bits for rate, bits in found["chosen_from"].items()}
        assert found["rate"] == min(tried, key=tried.__getitem__), name
        assert min(tried) < found["rate"] < max(tried), name


def test_what_the_page_says() -> None:
    milliseconds, mebibytes = REPORT["milliseconds"], REPORT["mebibytes"]
    assert min(RESULTS, key=mean) == "full fine-tuning"
    adapters = [name for name in RESULTS if "full" not in name]
    assert min(adapters, key=mean) == "SET"
    assert max(RESULTS["SET"]["bits"]) < min(RESULTS["LoRA (PEFT)"]["bits"])
    gained = {
        name: (REPORT["base"]["other"] - mean(name))
        / (REPORT["base"]["other"] - mean("full fine-tuning"))
        for name in RESULTS
    }
    for name, words in (
        ("LoRA (PEFT)", "LoRA {:.0%}"),
        ("fixed random mask", "a fixed random mask {:.0%}"),
        ("SET", "SET {:.0%}"),
        ("RigL", "RigL {:.0%}"),
    ):
        assert words.format(gained[name]).replace("%", " %") in TEXT, name
    slower = milliseconds["SET"] / milliseconds["LoRA (PEFT)"]
    assert f"{slower:.1f} times as long as with LoRA" in TEXT
    ours, theirs = mebibytes["fixed random mask"], mebibytes["fixed random mask (PEFT's SHiRA)"]
    assert f"{ours:.0f} MiB instead of {theirs:.0f}" in TEXT

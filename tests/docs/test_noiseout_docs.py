"""docs/noiseout.md: its example, its table (that of docs/results/noiseout.json), and what the
benchmark trains with.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "noiseout.md").read_text()
REPORT = json.loads((ROOT / "docs" / "results" / "noiseout.json").read_text())


def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, imported from its file (dataclasses look their module up by name)."""
    spec = importlib.util.spec_from_file_location(
        "noiseout_benchmark", ROOT / "benchmarks" / "noiseout.py"
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "noiseout_benchmark", module)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    assert benchmark(monkeypatch).table(REPORT) in PAGE


def test_counts_are_those_of_the_networks() -> None:
    """Parameters and shares follow from the neurons, by the formulas of the paper's two
    networks.
    """
    for run in (
        r for runs in REPORT["networks"]["lenet-300-100"]["results"].values() for r in runs
    ):
        a, b = run["neurons"]
        assert run["parameters"] == 784 * a + a + a * b + b + 10 * b + 10
        assert run["removed"] == pytest.approx(100 * (1 - run["parameters"] / 266_610))
    for name in ("lenet-5", "lenet-5, channels too"):
        for run in (r for runs in REPORT["networks"][name]["results"].values() for r in runs):
            (neurons,), (_, channels) = run["neurons"], run["channels"]
            assert channels == 32 or name != "lenet-5"
            assert (
                run["parameters"]
                == 832 + 289 * channels + neurons * (36 * channels + 1) + 10 * neurons + 10
            )
            assert run["removed"] == pytest.approx(100 * (1 - run["parameters"] / 605_546))


def test_what_the_page_says_of_the_papers_figures() -> None:
    def mean(network: str, noise: str, key: str) -> float:
        runs = REPORT["networks"][network]["results"][noise]
        assert len(runs) == 3
        return sum(run[key] for run in runs) / len(runs)

    large = REPORT["networks"]["lenet-300-100"]["results"]
    for noise, runs in large.items():
        assert min(run["removed"] for run in runs) > 94.33
        assert mean("lenet-300-100", noise, "test_error") < 3.05
    assert (
        f"up to {max(run['test_error'] for runs in large.values() for run in runs):.2f} %"
    ) in PAGE
    first = [run["neurons"][0] for runs in large.values() for run in runs]
    assert f"There are {min(first)} to {max(first)} neurons in the first layer" in PAGE
    for network, words in (
        ("lenet-5", "with gaussian noise outputs: {:.2f} %,"),
        ("lenet-5, channels too", "{:.2f} %"),
    ):
        assert words.format(mean(network, "gaussian", "removed")) in PAGE
        assert mean(network, "gaussian", "test_error") <= 0.95
    assert mean("lenet-5, channels too", "gaussian", "removed") >= 97.75


def test_the_rate_falls_without_merges_and_rises_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark(monkeypatch)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    stage = module.Stage(cycle=2, back=0.25, most=9, lr=1.0, lr_end=0.01)
    anneal = module.Anneal(stage, optimizer, 2)  # four steps to the end
    rates = []
    for merges in (0, 0, 0, 5, 5, 5, 5):
        anneal.step(merges)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01**at for at in (0.25, 0.5, 0.75, 0.5, 0.75, 1.0, 1.0)])
    assert anneal.at > 1


def test_a_check_sees_the_mean_of_the_last_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark(monkeypatch)
    model = torch.nn.Linear(1, 1, bias=False)
    average = module.Average(
        module.Stage(cycle=1, back=0, most=1, lr=1.0, every=4, average=0.5), model
    )
    seen = []
    for value in (1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0, 10.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.step()
        seen.append(model.weight.item())
    assert seen == [1, 2, 3, 4, 6, 7, 8, 9]


def test_shifts_move_images_and_maps_by_whole_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark(monkeypatch)
    image = torch.zeros(28, 28)
    image[10, 12] = 1
    moved = module.Shifts(2, torch.Generator().manual_seed(0))(
        image.view(1, 784).repeat(500, 1)
    ).view(-1, 28, 28)
    places = {tuple(p) for p in (moved.nonzero()[:, 1:] - torch.tensor([10, 12])).tolist()}
    assert places == {(a, b) for a in range(-2, 3) for b in range(-2, 3)}
    maps = torch.zeros(8, 12, 12, 3)
    maps[:, 6, 5, 1] = 1
    found = module.Shifts(1, torch.Generator().manual_seed(0))(maps).nonzero()
    assert len(found) == 8
    assert bool((found[:, 1:3] - torch.tensor([6, 5])).abs().max() == 1)
    assert bool((found[:, 3] == 1).all())


def test_a_plan_is_changed_by_names(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = benchmark(monkeypatch).PLANS["lenet-300-100"]
    changed = plan.changed(["bar=2.5", "all.most=7"])
    assert (changed.bar, changed.stages["all"].most) == (2.5, 7)
    assert changed.changed([f"bar={plan.bar}", f"all.most={plan.stages['all'].most}"]) == plan

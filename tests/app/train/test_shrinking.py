"""What a run says about a network that gets smaller: units and connections over time, sizes before
and after.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import rewire
import toy
from rewire import methods
from rewire.app import report
from rewire.app.errors import TrainError
from rewire.app.report import figures
from rewire.app.report.read import read_run
from rewire.app.train import before_after as comparison
from rewire.app.train import display, loop
from rewire.app.train.config import make_config
from rewire.app.train.metrics import evaluate
from rewire.app.train.parts import assemble
from rewire.app.train.remaining import structure
from rewire.app.train.run_dir import RunDir
from rewire.app.train.task import Task

DENSE: dict[str, Any] = {
    "hidden": [12, 9],
    "epochs": 3,
    "batch_size": 100,
    "lr": 0.01,
    "optimizer": "adam",
    "threads": 1,
}
RUNS: dict[str, dict[str, Any]] = {
    "noiseout": {"required_score": 0.0, "at_once": 2},
    "differentiable": {"strength": 0.05, "initial": 0.9},
    "halo": {"density": 0.2},
    "ternary": {"density": 0.2},
}
POSSIBLE = 64 * 12 + 12 * 9 + 9 * 10


def by_hand(dense: list[torch.Tensor]) -> tuple[list[int], list[int]]:
    """Units with an entry in their row and, in the layer above, in their column; entries that are
    not zero.
    """
    units = []
    for number, weight in enumerate(dense):
        above = dense[number + 1] if number + 1 < len(dense) else None
        units.append(
            sum(
                any(weight[u, i] != 0 for i in range(weight.shape[1]))
                and (above is None or any(above[o, u] != 0 for o in range(above.shape[0])))
                for u in range(weight.shape[0])
            )
        )
    return units, [int((weight != 0).sum()) for weight in dense]


def dense_weights(model: nn.Module) -> list[torch.Tensor]:
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, rewire.nn.SparseLinear))]
    return [
        m.weight.detach() if isinstance(m, nn.Linear) else m.weight.to_dense().detach()
        for m in layers
    ]


@pytest.mark.parametrize("name", RUNS)
def test_what_a_dense_run_says_about_itself(tmp_path: Path, name: str) -> None:
    if name in ("noiseout", "differentiable"):
        pytest.importorskip("torch_pruning")
    options = make_config(DENSE | {"method": name, "method_options": RUNS[name]})
    made = loop.Trainer(assemble(options, toy.dataset()), RunDir(tmp_path))
    made.run_dir.start(made.config, overwrite=False)
    made.begin()
    made.train(loop.Observer(), lambda: 0)
    result = made.finish()
    model = made.method.finalize()  # once more: the same
    assert result["test_accuracy"] == evaluate(model, toy.dataset().test_x, toy.dataset().test_y)[1]
    units, connections = by_hand(dense_weights(model))
    after, before = result["after"], result["before"]
    assert [layer["active_units"] for layer in after["layers"]] == units
    assert [layer["connections"] for layer in after["layers"]] == connections
    assert result["connections"] == sum(connections) < POSSIBLE
    assert (before["network"], before["parameters"], before["multiply_adds"]) == (
        "dense",
        POSSIBLE + 31,
        POSSIBLE,
    )
    assert before["bytes"] == 4 * before["parameters"]
    assert after["file_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert after["bytes"] == sum(t.numel() * t.element_size() for t in saved.values())
    took = result["inference"]
    assert took["samples"] == 256
    assert min(took["before_ms"], took["after_ms"], took["speedup"]) > 0
    _, metrics, _ = toy.outcome(tmp_path)
    for line in metrics:
        assert [len(line["units"]), len(line["connections"])] == [3, 3]
    line = display.change_line(result)
    assert line is not None
    assert f"{before['bytes']:,} -> {after['bytes']:,} bytes" in line
    assert f"units 12-9-10 -> {'-'.join(map(str, units))}" in line
    page = report.write(tmp_path).read_text()
    assert "Before and after" in page
    assert "Active units" in page
    assert ("Fan-in and fan-out" in page) == (name in ("halo", "ternary"))
    assert [layer.connections for layer in read_run(tmp_path).layers] == connections


def test_units_behind_a_gate_that_is_off_and_their_connections_are_gone() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    method = methods.create("differentiable", model, torch.optim.Adam(model.parameters()))
    with torch.no_grad():
        for layer, off in ((model[0], [1, 4, 6]), (model[2], [3])):
            layer.rewire_gate.alpha[off] = 0
    on = [on for on, _ in method.stats()["components"].values()]
    assert on == [5, 4]
    found = structure(model, method)
    assert list(found.units.values()) == [*on, 3]
    a, b = on
    assert list(found.connections.values()) == [6 * a, a * b, b * 3]


def test_units_of_pools_and_of_values_that_take_no_part() -> None:
    generator = torch.Generator().manual_seed(3)
    layers = [
        rewire.nn.SparseLinear(i, o, connections=k, generator=generator)
        for i, o, k in ((9, 7, 11), (7, 5, 6))
    ]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    units, connections = by_hand(dense_weights(model))
    assert structure(model).units == {"0.weight": units[0], "2.weight": units[1]}
    assert list(structure(model).connections.values()) == connections == [11, 6]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    threshold = float(layers[0].weight.values.detach().abs().median())
    method = methods.create("l1", model, optimizer, zero=threshold)
    large = [w * (w.abs() > threshold) for w in dense_weights(model)]
    units, connections = by_hand(large)
    found = structure(model, method)
    assert (list(found.units.values()), list(found.connections.values())) == (units, connections)
    assert sum(connections) < 17


def test_pools_that_shrink_are_compared_with_what_is_smaller(tmp_path: Path) -> None:
    changes = {"method": "snip", "method_options": {"batches": 2}}
    result = loop.run(toy.config(**changes), toy.dataset(), RunDir(tmp_path / "dense"))
    assert (result["before"]["network"], result["before"]["multiply_adds"]) == ("dense", POSSIBLE)
    changes["start_density"] = 0.25  # a dense network would be larger than the start
    result = loop.run(toy.config(**changes), toy.dataset(), RunDir(tmp_path / "start"))
    assert result["before"]["network"] == "start"
    assert result["before"]["multiply_adds"] == sum(
        layer["connections"] for layer in result["info"]["layers"]
    )
    assert "the network that training began with" in report.write(tmp_path / "start").read_text()
    # deep-r keeps what it has
    result = loop.run(toy.config(), toy.dataset(), RunDir(tmp_path / "kept"))
    assert not {"before", "after", "inference"} & result.keys()
    assert display.change_line(result) is None


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("one-shot", {"after": 1}),
        ("one-shot", {"after": 99}),
        ("magnitude", {"cycles": 10}),
        ("noiseout", {"required_score": 0.8, "warmup": 1}),
    ],
)
def test_scores_are_those_of_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any]
) -> None:
    """Validation is scored behind a cut or merge, as connections are counted, and at last that of
    what is returned.
    """
    seen: list[int] = []

    def evaluated(model: nn.Module, x: Tensor, y: Tensor, task: Task) -> tuple[float, float]:
        seen.append(sum(structure(model).connections.values()))
        return 0.0, seen[-1] / 1000

    monkeypatch.setattr(loop, "evaluate", evaluated)
    budget = {} if method == "noiseout" else {"density": [0.2]}
    config = make_config(
        DENSE | budget | {"method": method, "method_options": options, "epochs": 2}
    )
    result = loop.run(config, toy.dataset(), RunDir(tmp_path / "run"))
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    left = [sum(line["connections"]) for line in lines]
    assert result["connections"] == left[-1] < POSSIBLE
    assert [line["validation_accuracy"] for line in lines] == [k / 1000 for k in left]


def test_methods_that_keep_their_budget_are_scored_as_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SET changes connections and perhaps active units at the end of an epoch: the score is of the
    trained network.
    """
    calls: list[int] = []

    def evaluated(model: nn.Module, x: Tensor, y: Tensor, task: Task) -> tuple[float, float]:
        calls.append(len(y))
        return evaluate(model, x, y, task)

    monkeypatch.setattr(loop, "evaluate", evaluated)
    loop.run(
        toy.config(method="set", method_options={}, epochs=3),
        toy.dataset(),
        RunDir(tmp_path / "run"),
    )
    assert len(calls) == 3 + 1  # and the test set


def test_times_are_taken_in_turns_and_compared_within_a_round() -> None:
    order: list[str] = []

    class Takes(nn.Module):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__()
            self.name, self.seconds = name, seconds

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal now
            order.append(self.name)
            # the machine is slow now and then
            now += self.seconds * (100 if next(turn) % 40 == 17 else 1)
            return x

    now, turn = 0.0, itertools.count()
    slow, fast = Takes("slow", 0.03), Takes("fast", 0.01)
    fast.eval()
    took = comparison.in_turns(slow, fast, torch.zeros(5, 2), clock=lambda: now)
    assert took.before_ms == pytest.approx(30)
    assert took.after_ms == pytest.approx(10)
    assert took.speedup == pytest.approx(3)
    assert took.quartiles == pytest.approx((3, 3))
    assert took.samples == 5
    assert took.rounds >= comparison.LEAST
    assert order.count("slow") == order.count("fast")
    assert slow.training
    assert not fast.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "halo", "connections": 200}, "--connections: halo starts .* use --density"),
        (
            {"method": "halo", "density": [0.2, 0.2, 0.2]},
            "--density: given 3 numbers, allowed is one: halo",
        ),
        (
            {"method": "halo", "density": [0.2], "method_options": {"density": 0.1}},
            "--density and --set density both",
        ),
        (
            {"method": "differentiable", "density": [0.2]},
            "--density: differentiable starts .* leave it out",
        ),
        (
            {"method": "differentiable", "weight_decay": 0.1, "bias": False},
            "weight decay.*leave out --weight-decay$",
        ),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message) as caught:
        loop.run(make_config(DENSE | changes), toy.dataset(), RunDir(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_report_of_a_dense_run_that_goes_on(tmp_path: Path) -> None:
    options = make_config(
        DENSE | {"method": "halo", "method_options": RUNS["halo"] | {"after_epochs": None}}
    )
    made = loop.Trainer(assemble(options, toy.dataset()), RunDir(tmp_path))
    made.run_dir.start(made.config, overwrite=False)
    made.begin()
    assert "This run is not finished" in report.write(tmp_path).read_text()
    made.train(loop.Observer(), lambda: 0)
    page = report.write(tmp_path).read_text()
    assert "Active units" in page
    assert "Before and after" not in page
    found = read_run(tmp_path)
    assert [(layer.inputs, layer.outputs) for layer in found.layers] == [(64, 12), (12, 9), (9, 10)]
    assert figures.units(found) is not None
    for line in found.metrics:
        del line["units"]  # as runs that have not counted them
    assert figures.units(found) is None

"""The contenders compute the same; every target runs on a tiny problem and gives figures; the child
tells its memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rewire.app import resident
from rewire.app.bench import child, curves, large, models, sections, step_memory, targets
from rewire.app.bench.contenders import LAYERS, Layer, Linear, make
from rewire.app.bench.curves import Setting, installed
from rewire.app.bench.targets import big, conv, inference, layers, training, transformer
from rewire.app.errors import BenchError, NotAvailable, UserError

SETTING = Setting(threads=1, seconds=0.0, rounds=2, quick=True)
PROC = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured through /proc"
)


@pytest.mark.parametrize("kind", installed())
def test_contenders_agree(kind: str) -> None:
    problem = Linear(Layer(20, 30, 150, 7))
    y, grad_x, grad_weight, grad_bias = make(kind, problem).run()  # type: ignore[misc]
    dense = [t.detach().requires_grad_() for t in (problem.x, problem.dense, problem.sparse.bias)]
    expected = torch.nn.functional.linear(*dense)
    gradients = torch.autograd.grad(expected, dense, problem.g)
    for mine, theirs in zip(
        (y, grad_x, grad_bias), (expected, gradients[0], gradients[2]), strict=True
    ):
        torch.testing.assert_close(mine.detach(), theirs.detach())
    rows, cols, _ = problem.weight.coo()
    at_connections = gradients[1][rows, cols]
    if kind.startswith("rewire"):
        assert grad_weight.shape == (150,)
        torch.testing.assert_close(grad_weight[problem.weight.active()], at_connections)
    elif kind == "csr":
        torch.testing.assert_close(grad_weight.values(), at_connections)
    elif kind not in ("sparseprop", "sparselab"):  # their order is their own
        torch.testing.assert_close(grad_weight[rows, cols], at_connections)


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = ("sparseprop", "sparselab", "onednn")
    for module in (curves, layers):
        monkeypatch.setattr(module, "can_make", lambda kind: kind not in lacking)
    assert installed() == [kind for kind in LAYERS if kind not in lacking]
    curve = curves.measure(8, 12, 4, [0.2, 0.5], SETTING).to_json()
    assert "onednn / dense" not in curve["break_even"]
    assert set(curve["seconds"]) == {"dense", "masked", "csr", "rewire", "rewire feature-major"}
    assert all(len(times) == 2 for times in curve["seconds"].values())
    figures, _ = layers.against_sparse(SETTING, [(16, 8, 4)], {0.5: 1.0})
    assert [f.name for f in figures if f.value is None] == ["over SparseProp", "over SparseLab"]


@pytest.mark.parametrize(
    "measure",
    [
        lambda: layers.against_ceiling(SETTING, {(16, 0.2): 1.0}, {16: (4, 9)}, {(16, 0.2): 1.0}),
        lambda: layers.against_sparse(SETTING, [(16, 8, 4)], {0.5: 1.0}),
        lambda: layers.row_major(SETTING, 16, (4, 5), {0.2: 1.0}),
        lambda: layers.breaks_even(SETTING, 16, 4, (0.1, 1.0)),
        lambda: layers.second_thread(SETTING, 16, 4, (0.2,)),
        lambda: training.deep_r_share(SETTING, 32, 400, 4),
        lambda: training.update_share(SETTING, 32, 4, (0.2,)),
        lambda: training.lenet(SETTING, 4),
        lambda: training.small(SETTING, 2),
        lambda: inference.forward(SETTING, {(8, 12): {0.5: 1.0, 0.2: 1.0}}, (1, 3)),
        lambda: transformer.step(SETTING, transformer.Size(1, 64, 10, 6, 2)),
    ],
    ids=["p1", "p2", "p13", "p3", "p4", "p5", "p6", "p7", "p12", "p14", "p15"],
)
def test_bars_give_figures(measure: Callable[[], targets.Measured]) -> None:
    figures, _ = measure()
    assert any(f.met is not None for f in figures)
    assert len({f.name for f in figures}) == len(figures)
    assert all(f.value is None or f.value >= 0 for f in figures)


def test_as_many_connections_flip_in_p5_as_it_says() -> None:
    figures, _ = training.deep_r_share(SETTING, 32, 500, 4, flips=(0.1,))
    assert all(f.note.startswith("10.00% flipped a step") for f in figures)


def test_conv_compares_with_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(*args: Any, density: float, **more: Any) -> nn.Module:
        return nn.Conv2d(*args, **more)

    monkeypatch.setattr(conv, "SparseConv2d", stand_in)
    figures, _ = conv.against_dense(SETTING, shapes=((4, 8, 2),))
    assert len(figures) == 3


class _Meter(resident.Memory):
    """Memory that is always the same."""

    def now(self) -> int:
        return 0

    def peak(self) -> int:
        return 1 << 30

    def total(self) -> int:
        return 1 << 30

    def reset(self) -> None:
        pass


def test_tasks_of_the_child() -> None:
    meter = _Meter()
    for optimizer in ("sgd", "momentum", "adam"):
        result = large.training_memory(
            meter, time.perf_counter, optimizer=optimizer, size=40, connections=200, batch=4
        )
        assert {"built", "training", "rebuild", "reorder", "set"} <= set(result)
    assert (
        large.point(
            meter, time.perf_counter, size=40, connections=200, batch=4, steps=2, seconds=0.0
        )["steps"]
        == 2
    )
    got = large.million(
        meter, time.perf_counter, size=50, connections=300, batch=4, steps=2, rounds=2
    )
    assert got["share"] > 0
    assert got["peak"] == 1 << 30
    wide = large.wide_epoch(
        meter,
        time.perf_counter,
        inputs=30,
        classes=3,
        samples=10,
        hidden=[20, 20],
        epsilon=2.0,
        batch=2,
    )
    assert (wide["neurons"], wide["steps"], wide["connections"]) == (73, 5, 100 + 80 + 46)


@pytest.mark.parametrize("method", big.with_sparse_memory())
def test_one_update_of_every_method(method: str) -> None:
    """SNFS needs ten steps of an epoch that is one step long, SRigL replaces whole rows."""
    got = large.one_update(
        _Meter(), time.perf_counter, method=method, size=40, connections=300, batch=4
    )
    assert got["updates"] >= 1
    assert got["connections"] <= 300
    assert got["replaced"] > 0 or method == "deep-r"


def test_updates_of_a_method_that_is_measured_and_of_one_that_dies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measured(task: str, arguments: dict[str, Any], **_: Any) -> dict[str, Any]:
        if arguments["method"] == "set":
            raise NotAvailable("killed")
        times = {f"{what}_seconds": 1.0 for what in ("build", "step", "update")}
        return {"peak": 5 << 30, "updates": 1, "replaced": 7} | times

    monkeypatch.setattr(child, "measure", measured)
    figures, data = big.updates(Setting(), ["rigl", "set"])
    assert [(f.value, f.met) for f in figures] == [(5.0, False), (None, None)]
    assert list(data) == ["rigl"]


@PROC
def test_the_child_measures_and_a_failure_is_not_available() -> None:
    point = {"size": 2000, "connections": 1_000_000, "batch": 2, "steps": 2, "seconds": 0.0}
    result = child.measure("point", point, threads=1)
    assert 20e6 < result["bytes"] < 80e6
    with pytest.raises(NotAvailable, match="failed"):
        child.measure("point", {"size": 0}, threads=1)


def test_the_line_stops_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(task: str, arguments: dict[str, Any], **_: Any) -> dict[str, Any]:
        k = arguments["connections"]
        return {
            "connections": k,
            "seconds": 1e-3 + 1e-8 * k,
            "best": 1e-8 * k,
            "bytes": 1e6 + 32.0 * k,
        }

    monkeypatch.setattr(child, "measure", measured)
    monkeypatch.setattr(big.machine, "available_memory", lambda: 5 * 10**9)
    figures, data = big.line(Setting())
    assert [p["connections"] for p in data["points"]] == [
        10**4,
        10**5,
        10**6,
        3 * 10**6,
        10**7,
        3 * 10**7,
    ]
    assert [f.value is None for f in figures if f.name == "the end of the line"] == [True]
    assert all(f.met for f in figures if f.met is not None)


def test_steps_need_their_activations() -> None:
    """Measured in this process: what a dense step needs is at least its largest activation."""
    for kind in ("dense", "sparse"):
        got = step_memory.step_memory(
            _Meter(), time.perf_counter, kind=kind, width=8, layers=2, rows=5, density=0.5
        )
        assert got == {"peak": 1 << 30}


@PROC
def test_memory_of_a_step_beside_dense() -> None:
    (figure,), data = big.step_memory(SETTING, width=256, layers=2, rows=4096)
    activation = 4 * 256 * 4096
    assert all(2 * activation < got["peak"] < 16 * activation for got in data.values())
    assert figure.value == data["sparse"]["peak"] / data["dense"]["peak"]


def test_models() -> None:
    model, shape = models.load("resnet18", None)
    layers, others = models.layers(model, shape, 32)
    found = dict(layers)
    assert others == []
    assert sum(p.numel() for p in model.parameters()) == 11_689_512
    linear = [f for f in found.values() if f.is_linear]
    assert [(f.inputs, f.outputs, f.rows) for f in linear] == [(512, 1000, 32)]
    assert len(found) == 21
    assert next(iter(found.values())).shown == "conv 7 x 7, 3 to 64 channels, 224 x 224"


def test_layers_of_the_mini_gpt_and_their_rows() -> None:
    model, shape = models.load("gpt-40m", None)
    layers, others = models.layers(model, shape, 8)
    assert others == []
    assert len(layers) == 8 * 4 + 1
    assert {found.rows for _, found in layers} == {8 * 128}
    weights = sum(f.inputs * f.outputs for _, f in layers)
    assert 39e6 < weights < 41e6


def test_a_model_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_model_for_bench.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), "
        "nn.Linear(5, 5))\n"
        "def conv():\n    return nn.Conv2d(1, 2, 3)\n"
        "def three():\n    return 3\n"
        "class Ends(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.b, self.unused = nn.Linear(4, 5), nn.LSTM(5, 3), nn.Conv1d(2, 2, 2)\n"
        "    def forward(self, x):\n        return self.b(self.a(x))[0]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    said: list[str] = []
    result = sections.model(SETTING, "own_model_for_bench:make", None, 0.5, 3, said.append)
    assert [row["name"] for row in result["layers"]] == ["0", "2", "3"]
    assert len(said) == 2  # two of the layers are alike
    assert {row["verdict"] for row in result["layers"]} <= {"sparse", "dense"}
    assert all(row["break_even"] is None or row["break_even"] <= 1 for row in result["layers"])
    result = sections.model(SETTING, "own_model_for_bench:Ends", None, 0.5, 3, said.append)
    assert [(row["name"], row["layer"]) for row in result["layers"]] == [
        ("a", "linear 5 x 4"),
        ("b", "LSTM"),
    ]
    assert result["layers"][1]["verdict"] == "not measured"
    for wrong, line in (
        ("own_model_for_bench:conv", "give --input"),
        ("own_model_for_bench:three", "returned a int"),
        ("own_model_for_bench:nothing", "cannot be made"),
        ("no_such_module_here:make", "cannot be made"),
        ("vgg", "allowed are mlp, resnet18, gpt-40m"),
    ):
        with pytest.raises(UserError, match=line):
            models.load(wrong, None)
    model, _ = models.load("own_model_for_bench:make", None)
    with pytest.raises(BenchError, match="does not pass"):
        models.layers(model, (7,), 2)

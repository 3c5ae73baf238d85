"""NIR: what the package reads back computes the same, and has the connections in its metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

import rewire
from rewire.app import cli
from rewire.export import states

NEURONS = {"IF", "LIF"}


def computed(graph: Any, x: Tensor) -> Tensor:
    """The outputs of a graph read back, with ReLU in the place of neurons."""
    after = dict(graph.edges)
    name = "input"
    while (name := after[name]) != "output":
        node = graph.nodes[name]
        kind = type(node).__name__
        t = {k: torch.as_tensor(v) for k, v in vars(node).items() if isinstance(v, np.ndarray)}
        if kind in ("Affine", "Linear"):
            x = F.linear(x, t["weight"], t.get("bias"))
        elif kind in ("Conv1d", "Conv2d"):
            conv: Any = F.conv1d if kind == "Conv1d" else F.conv2d
            numbers = {
                k: np.atleast_1d(getattr(node, k)).tolist()
                for k in ("stride", "padding", "dilation")
            }
            x = conv(x, t["weight"], t["bias"], groups=int(node.groups), **numbers)
        elif kind == "Flatten":
            x = x.flatten(int(node.start_dim) + 1)
        elif kind == "AvgPool2d":
            sizes = (node.kernel_size, node.stride, node.padding)
            x = F.avg_pool2d(x, *(np.asarray(n).tolist() for n in sizes))
        else:
            assert kind in NEURONS
            x = x.relu()
    return x


def pixels() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3, stride=(1, 2), padding=1, bias=False), nn.BatchNorm2d(6)),
        nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(48, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4, bias=False),
    )  # fmt: skip


def sounds() -> nn.Sequential:
    conv = nn.Conv1d(4, 6, 3, padding=1, dilation=2)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(60, 3))


@pytest.mark.parametrize(
    ("make", "shape", "neurons"),
    [(pixels, (2, 8, 8), "if"), (sounds, (4, 12), "lif"), (sounds, (4, 12), "none")],
)
def test_the_package_reads_the_same_network(
    make: Any, shape: tuple[int, ...], neurons: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = rewire.sparsify(make(), density=0.3, exclude="8").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.uniform_()
            module.running_var.uniform_(1, 2)
            module.weight.data.uniform_(-1, 1)
    path = tmp_path / "net.nir"
    x = torch.randn(5, *shape)
    size = rewire.export.save_nir(model, x[:1], path, neurons=neurons)
    assert size == path.stat().st_size
    graph = nir.read(path)
    assert tuple(graph.nodes["input"].input_type["input"]) == shape
    kinds = [type(node).__name__ for node in graph.nodes.values()]
    assert set(kinds) & NEURONS == ({neurons.upper()} if neurons != "none" else set())
    if neurons == "none":
        model = nn.Sequential(*(m for m in model if not isinstance(m, nn.ReLU)))
    with torch.no_grad():
        torch.testing.assert_close(computed(graph, x), model(x), rtol=1e-4, atol=1e-5)
    weights = [w for _, w in rewire.sparse_weights(model)]
    nodes = [node for node in graph.nodes.values() if node.metadata]
    assert len(nodes) == len(weights)
    for node, weight in zip(nodes, weights, strict=True):
        lists = tuple(node.metadata[f"sparse_{p}"] for p in ("data", "indices", "indptr"))
        matrix = sparse.csr_array(lists, shape=weight.matrix_shape)
        assert matrix.nnz == weight.connections
        assert np.array_equal(matrix.toarray(), node.weight.reshape(weight.matrix_shape))


def test_neurons_of_ones_own(tmp_path: Path) -> None:
    model = rewire.sparsify(sounds(), density=0.3)
    asked: list[tuple[int, ...]] = []

    def make(shape: tuple[int, ...]) -> Any:
        asked.append(shape)
        return nir.LI(tau=np.ones(shape), r=np.ones(shape), v_leak=np.zeros(shape))

    rewire.export.save_nir(model, torch.zeros(1, 4, 12), tmp_path / "net.nir", neurons=make)
    assert asked == [(6, 10)]
    kinds = [type(node).__name__ for node in nir.read(tmp_path / "net.nir").nodes.values()]
    assert "LI" in kinds


@pytest.mark.parametrize(
    ("extra", "shape", "said"),
    [
        (nn.Tanh(), (6,), r"2 \(Tanh\) cannot be written to NIR: allowed are torch.nn.Sequentials"),
        (nn.LSTM(6, 3), (6,), r"2 \(LSTM\) cannot be written"),
        (nn.Conv1d(6, 2, 1, padding_mode="reflect"), (6, 5), "reflect"),
        (nn.Conv1d(6, 2, 1, groups=2), (6, 5), "groups"),
        (nn.Linear(5, 3), (6,), "does not read the example"),
    ],
)
def test_what_nir_cannot_hold_is_refused_by_name(
    extra: nn.Module, shape: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    layers = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), extra)
    if isinstance(extra, nn.Conv1d):
        layers = nn.Sequential(nn.Conv1d(6, 6, 1), nn.ReLU(), extra)
    model = rewire.sparsify(layers, density=0.5, only="0")
    with pytest.raises(ValueError, match=said):
        rewire.export.save_nir(model, torch.zeros(1, *shape), tmp_path / "a.nir")
    with pytest.raises(ValueError, match="neurons must be"):
        rewire.export.nir_graph(model, torch.zeros(1, *shape), neurons="sigma")  # type: ignore[arg-type]
    assert not (tmp_path / "a.nir").exists()


def test_from_the_command_line_within_the_limit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = str(tmp_path / "run"), tmp_path / "digits.nir"
    quick = ["--hidden", "20", "--epochs", "1", "--batch-size", "300", "--quiet"]
    assert cli.run(["train", *quick, "--run-dir", folder]) == 0
    monkeypatch.setattr(states, "DENSE_LIMIT", 5000)
    assert cli.run(["export", folder, "--nir", str(path)]) == 2
    assert "--nir: 0.weight would have 5,120 bytes" in capsys.readouterr().err
    assert not path.exists()
    told = ["export", folder, "--nir", str(path), "--dense", "--neurons", "lif"]
    assert cli.run(told) == 0
    assert f"{path.stat().st_size:,} bytes" in capsys.readouterr().out
    assert [type(n).__name__ for n in nir.read(path).nodes.values()].count("LIF") == 1
    assert cli.run([*told[:-1], "izhikevich"]) == 2
    assert "--neurons: given 'izhikevich', allowed are if, lif, none" in capsys.readouterr().err

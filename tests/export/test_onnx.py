"""ONNX: onnxruntime gives equal outputs from sparse and from dense initialisers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import rewire
from interpreter import run_python
from mixed import mixed
from rewire.app import cli


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


class Network(nn.Module):
    """A convolution, a norm, linear layers, an empty weight and a dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 30, 3, padding=1), nn.BatchNorm2d(30)
        self.hidden, self.out = nn.Linear(120, 90), nn.Linear(90, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).relu().flatten(1)
        out: Tensor = self.out(torch.tanh(self.hidden(h)))
        return out


@functools.cache
def network() -> Any:
    torch.manual_seed(0)
    model: Any = rewire.sparsify(Network(), density=0.1, exclude="out")
    model.norm.running_var.uniform_(1, 2)
    return model.eval()


@pytest.mark.parametrize("dense", [False, True])
def test_outputs_are_equal_and_sizes_are_said(dense: bool, tmp_path: Path) -> None:
    model, path = network(), tmp_path / "net.onnx"
    made = rewire.export.save_onnx(model, torch.zeros(1, 8, 2, 2), path, dense=dense)
    x = torch.randn(7, 8, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(run(path, x), model(x), rtol=1e-5, atol=1e-6)
    assert made.bytes == path.stat().st_size
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    assert proto.opset_import[0].version == made.opset == rewire.export.OPSET
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    names = {tensor.values.name for tensor in proto.graph.sparse_initializer}
    assert names == (set() if dense else {"conv.weight", "hidden.weight"})
    for weight in made.weights:
        pool: Any = model.get_submodule(weight.name)
        assert weight.stored == ("dense" if dense else "sparse")
        assert weight.bytes == (4 * pool.size if dense else 12 * pool.connections)
    saved = sum(w.dense_bytes - w.bytes for w in made.weights)
    assert made.dense_bytes - made.bytes == saved
    assert saved > 20_000 or dense
    assert f"{made.bytes:,} bytes" in str(made)


@pytest.mark.slow
def test_recurrent_layers_and_attention(tmp_path: Path) -> None:
    """Attention stacks three weights in one; there is an empty weight, and one with spare slots."""
    model, x = mixed(), torch.randn(3, 3, 20)
    rewire.export.save_onnx(model, x, tmp_path / "net.onnx")
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "net.onnx", x), model(x), rtol=1e-5, atol=1e-6)


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = rewire.sparsify(nn.Sequential(nn.Linear(20, 20), nn.Dropout(0.5)), density=0.1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rewire.export.save_onnx(model, torch.zeros(2, 20), tmp_path / "net.onnx")
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    x = torch.randn(4, 20)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "net.onnx", x), model.eval()(x))


@pytest.mark.slow
def test_no_dense_array_is_made(tmp_path: Path) -> None:
    """300,000 x 20,000 would be 24 GB; a weight without connections is written as well."""
    path = tmp_path / "net.onnx"
    code = f"""
import resource, torch, onnx, onnxscript, rewire
model = torch.nn.Sequential(rewire.nn.SparseLinear(20_000, 300_000, connections=1000))
resource.setrlimit(resource.RLIMIT_DATA, (6 * 10**9,) * 2)
rewire.export.save_onnx(model, torch.zeros(2, 20_000), {str(path)!r})
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    sparse = onnx.load(path).graph.sparse_initializer[0]
    assert list(sparse.dims) == [300_000, 20_000]
    assert list(sparse.values.dims) == [1000]
    places = np.frombuffer(sparse.indices.raw_data, np.int64)
    assert (np.diff(places) > 0).all()


def test_what_cannot_be_exported_is_said_in_a_line(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rewire.nn.SparseLinear(4, 4, density=0.5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y if y.sum() > 0 else x

    with pytest.raises(ValueError, match=r"torch.onnx cannot export the model: .{20,310}$"):
        rewire.export.save_onnx(Odd(), torch.randn(2, 4), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_from_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, path = str(tmp_path / "run"), tmp_path / "digits.onnx"
    quick = ["--hidden", "100", "--epochs", "1", "--batch-size", "300", "--quiet"]
    assert cli.run(["train", *quick, "--run-dir", folder]) == 0
    assert cli.run(["export", folder, "--onnx", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"{path}, {path.stat().st_size:,} bytes, all dense " in out
    assert run(path, torch.zeros(3, 64)).shape == (3, 10)

"""Adapted models with the rest of torch and rewire: fused kernels, copies, compilers, conversions,
and the size of what is allocated.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import rewire
from adapted import ids, network, train
from rewire.nn.forward.tensors import tensors_in
from rewire.nn.surgery import UnitGraph


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoders_of_torch_do_not_pass_differences_by(norm_first: bool) -> None:
    """In evaluation their fused kernels read the weights of linear layers themselves."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 2).eval()
    was = layer.activation_relu_or_gelu, model.use_nested_tensor
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        adapter = rewire.adapt(model, density=0.3)
        assert sorted(adapter.differences) == [
            f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)
        ]
        assert torch.allclose(
            model(x, src_key_padding_mask=padding)[~padding], before[~padding], atol=1e-5
        )
        for pool in adapter.differences.values():
            pool.values.normal_()
        adapted = model(x, src_key_padding_mask=padding)
        adapter.merge()
        assert (model.layers[0].activation_relu_or_gelu, model.use_nested_tensor) == was
        merged = model(x, src_key_padding_mask=padding)
        assert torch.allclose(adapted[~padding], merged[~padding], atol=1e-4)
        assert (adapted - before)[~padding].abs().max() > 0.1
        assert torch.equal(adapter.detach()(x, src_key_padding_mask=padding), before)


def test_copies_pickles_and_functional_calls() -> None:
    model = network()
    adapter = rewire.adapt(model, density=0.2)
    train(model, adapter)
    out = model(ids())
    twin = copy.deepcopy(adapter)
    assert torch.equal(twin.model(ids()), out)
    assert twin.model.head.weight is twin.model.embedding.weight is not model.head.weight
    twin.detach()
    assert torch.equal(model(ids()), out)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(ids()), out)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert torch.equal(functional_call(copy.deepcopy(model), tensors, ids()), out)
    other = network()
    rewire.adapt(other, density=0.2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids()), out)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself, in dynamo
def test_compiled_models_compute_the_same() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    adapter = rewire.adapt(model, density=0.3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(adapter.parameters(), 0.5)
    x = torch.randn(5, 8)
    for _ in range(2):
        out = compiled(x)
        optimizer.zero_grad()
        out.square().sum().backward()
        expected = torch.autograd.grad(model(x).square().sum(), list(adapter.parameters()))
        for parameter, gradient in zip(adapter.parameters(), expected, strict=True):
            assert torch.allclose(parameter.grad, gradient, atol=1e-6)
        optimizer.step()
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_frozen_copies_costs_and_other_conversions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    adapter = rewire.adapt(model, connections={"0": 10})
    with torch.no_grad():
        adapter.differences["0"].values.normal_()
    x = torch.randn(5, 8)
    assert torch.allclose(rewire.freeze(model)(x), model(x), atol=1e-6)
    cost = rewire.nn.cost(model, x)
    assert [(c.name, c.connections, c.multiply_adds) for c in cost.layers] == [
        ("0", 128, 128),
        ("0.difference", 10, 10),
        ("2", 64, 64),
    ]
    assert rewire.summary(model).connections == 10
    assert [c.name for c in rewire.nn.cost(adapter.merge(), x).layers] == ["0", "2"]


#: What takes layers as dense or as sparse ones, and would pass a difference by.
OTHERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "densify": lambda m, folder: rewire.densify(m),
    "sparsify": lambda m, folder: rewire.sparsify(m, density=0.5),
    "to_sparse": lambda m, folder: rewire.to_sparse(m, {"0": torch.ones(16, 8).bool()}),
    "surgery": lambda m, folder: UnitGraph(m, torch.randn(2, 8)),
    "nir": lambda m, folder: rewire.export.nir_graph(m, torch.randn(2, 8)),
    "c": lambda m, folder: rewire.export.c(m, torch.randn(1, 8), folder),
    "dense state": lambda m, folder: rewire.export.save(m, folder / "x", format="state-dict"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_would_pass_differences_by_refuses_the_model(name: str, tmp_path: Path) -> None:
    if name == "nir":
        pytest.importorskip("nir", reason="needs the extra nir")
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    rewire.adapt(model, density=0.3)
    with pytest.raises(ValueError, match=r"0 has a difference beside its weight.*merge\(\)"):
        OTHERS[name](model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_programs_and_onnx_compute_what_both_give(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    adapter = rewire.adapt(model, density=0.3)
    with torch.no_grad():
        for pool in adapter.differences.values():
            pool.values.normal_()
    x = torch.randn(5, 8)
    expected = model(x).detach()
    rewire.export.save_program(model, (x,), tmp_path / "x.pt2")
    program = torch.export.load(tmp_path / "x.pt2").module()
    assert torch.allclose(program(x), expected, atol=1e-5)
    rewire.export.save_onnx(model, x, tmp_path / "x.onnx")
    session = runtime.InferenceSession(tmp_path / "x.onnx")
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that an operator makes, beside those of the tensors given."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in [result] if isinstance(result, Tensor) else tensors_in(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.bytes = max(self.bytes, storage.nbytes())
        return result


@pytest.mark.parametrize("candidates", [None, "auto"])
def test_nothing_of_the_size_of_a_weight_is_made(candidates: Any, tmp_path: Path) -> None:
    """Neither by adapt, nor in training, updates, saving, loading and merging."""
    base = [nn.Linear(3000, 2000, bias=False), nn.ReLU(), nn.Linear(2000, 3000, bias=False)]
    model = nn.Sequential(*base).requires_grad_(False)
    weights = list(model.parameters())
    x = torch.randn(4, 3000)
    with Largest(weights) as largest:
        adapter = rewire.adapt(model, connections=2000)
        optimizer = torch.optim.Adam(adapter.parameters(), 0.01)
        method = rewire.methods.RigL(model, optimizer, every=1, until=9, candidates=candidates)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            method.step()
        assert method.stats()["updates"] == 2
        method.finalize()
        adapter.save(tmp_path / "a.safetensors")
        adapter.load(tmp_path / "a.safetensors")
        adapter.merge()
        adapter.detach()
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    size = weights[0].nbytes
    assert (tmp_path / "a.safetensors").stat().st_size < 2000 * 12 + 2000
    assert largest.bytes < size / 4
    with Largest(weights) as largest:  # it would see one
        weights[0] + 1
    assert largest.bytes == size

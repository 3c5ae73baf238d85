"""A mask of torch.nn.utils.prune becomes the topology."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import prune

from rewire.budget import Limits
from rewire.nn import SparseWeight, densify, sparsify, to_sparse
from twins import NAMES, connections, kind, output
from wrapped_layers import wrapped


def pruned(
    name: str, density: float = 0.4
) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]:
    model, args = wrapped(name)
    layer = model["layer"]  # type: ignore[index]
    for place, attribute in dict.fromkeys(kind(name).places(layer).values()):
        prune.random_unstructured(place, attribute, 1 - density)
    masks = {
        path: kind(name).part(layer, path, getattr(place, f"{attribute}_mask")).bool()
        for path, (place, attribute) in kind(name).places(layer).items()
    }
    return model, args, masks


PRUNED: dict[str, Callable[[nn.Module, dict[str, Tensor]], nn.Module]] = {
    "sparsify": lambda m, masks: sparsify(m),
    "magnitude": lambda m, masks: sparsify(m, select="magnitude"),
    "connections": lambda m, masks: sparsify(
        m, connections=sum(int(mask.sum()) for mask in masks.values())
    ),
    "density": lambda m, masks: sparsify(m, density=0.4, distribution="er"),
    "to_sparse": lambda m, masks: to_sparse(m),
    "to_sparse, masks": lambda m, masks: to_sparse(
        m, {f"layer.{p}": mask for p, mask in masks.items()}
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("way", PRUNED)
@pytest.mark.parametrize("name", NAMES)
def test_a_prune_mask_becomes_the_topology(name: str, way: str) -> None:
    model, args, masks = pruned(name)
    kept = model["layer"].register_forward_pre_hook(lambda *a: None)  # type: ignore[index]
    truth = {n: w.detach().clone() for n, w in kind(name).weights(model["layer"]).items()}  # type: ignore[index]
    expected = output(model, args).detach()
    model = PRUNED[way](model, masks)
    new = model["layer"]  # type: ignore[index]
    torch.testing.assert_close(output(model, args), expected, rtol=1e-4, atol=1e-5)
    for path, mask in masks.items():
        pool = new.get_submodule(path)
        assert isinstance(pool, SparseWeight)
        assert pool.connections == int(mask.sum())
        assert torch.equal(pool.to_dense(), truth[path])
    assert not any("_orig" in n or "_mask" in n for n in new.state_dict())
    assert not any(isinstance(h, prune.BasePruningMethod) for h in new._forward_pre_hooks.values())
    assert list(new._forward_pre_hooks) == [kept.id]
    output(model, args).sum().backward()
    optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(output(model, args), expected)  # it trains
    assert not any("_orig" in n or "_mask" in n for n in densify(model).state_dict())


def test_optimizers_follow_from_the_masked_parameter() -> None:
    torch.manual_seed(1)
    model, args, _ = pruned("Linear")
    torch.manual_seed(1)
    twin, _, _ = pruned("Linear")  # torch cannot copy a pruned layer
    one, other = (optim.Adam(list(m.named_parameters()), 0.01) for m in (model, twin))

    def train(m: nn.Module, optimizer: optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            output(m, args).square().sum().backward()
            optimizer.step()

    train(model, one)
    train(twin, other)
    to_sparse(model, optimizers=one)
    assert one.param_groups[0]["param_names"] == ["layer.bias", "layer.weight.values"]
    train(model, one)
    train(twin, other)
    torch.testing.assert_close(output(model, args), output(twin, args))


def test_a_partly_pruned_model() -> None:
    def make() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 2))
        prune.l1_unstructured(model[0], "weight", 0.5)
        return model

    model = sparsify(make())
    assert [type(m).__name__ for m in model] == ["SparseLinear", "ReLU", "Linear", "Linear"]
    model = sparsify(make(), density=0.5)
    assert connections(model[0]) == 24
    assert connections(model) == 44
    model = sparsify(make(), density={"2": 0.25})
    assert prune.is_pruned(model[0])
    assert connections(model) == 8
    model = sparsify(make(), density={"0": 0.5, "2": 0.25})
    assert [connections(m) for m in model] == [24, 0, 8, 0]
    model = make()
    prune.remove(model[0], "weight")
    sparsify(model, density=0.25, distribution="uniform", select="magnitude")
    assert connections(model[0]) == 12  # of those that are left


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_pruned_bias_stays_pruned() -> None:
    for name in ("Linear", "Conv2d", "LSTM"):
        model, args = wrapped(name)
        layer: Any = model["layer"]  # type: ignore[index]
        bias = "bias_ih_l0" if name == "LSTM" else "bias"
        prune.random_unstructured(layer, bias, 0.5)
        mask = getattr(layer, f"{bias}_mask")
        expected = output(model, args)
        sparsify(model, density=1.0, select="magnitude")
        torch.testing.assert_close(output(model, args), expected)
        densify(model)
        torch.testing.assert_close(output(model, args), expected)
        for change in (lambda m: sparsify(m, density=0.5), densify):
            change(model)
            new: Any = model["layer"]  # type: ignore[index]
            output(model, args).sum().backward()
            optim.SGD(model.parameters(), 1.0).step()
            output(model, args)
            assert not getattr(new, bias)[mask == 0].any()
            assert getattr(new, bias)[mask == 1].all()
        prune.remove(new, bias)


def test_a_mask_of_nothing_and_limits() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    prune.custom_from_mask(model[0], "weight", torch.zeros(3, 4))
    expected = model(torch.ones(2, 4))
    sparsify(model)
    assert connections(model) == 0
    torch.testing.assert_close(model(torch.ones(2, 4)), expected)
    model = nn.Sequential(nn.Linear(4, 3))
    prune.custom_from_mask(model[0], "weight", torch.eye(4)[:3])
    sparsify(model, limits=Limits(fan_in=1))
    assert model[0].weight.limits == Limits(fan_in=1)

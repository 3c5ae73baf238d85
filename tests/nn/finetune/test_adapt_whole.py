"""Adapters leave nothing half done: failed merges, memory in common, wrappers, files that lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rewire
from rewire.nn.finetune import files
from rewire.nn.layers.adapted import Adapted


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def moved(adapter: rewire.Adapter) -> rewire.Adapter:
    for pool in adapter.differences.values():
        nn.init.normal_(pool.values)
    return adapter


def test_what_train_names_is_trained_after_a_merge_that_was_taken_back() -> None:
    model = net().requires_grad_(False)
    adapter = rewire.adapt(model, density=0.2, train="2.bias")
    adapter.merge()
    assert not model[2].bias.requires_grad
    adapter.unmerge()
    assert [p.requires_grad for p in adapter.parameters()] == [True] * 3


def test_wrappers_are_refused(tmp_path: Path) -> None:
    rewire.adapt(net(), density=0.2).save(tmp_path / "a")
    wrapped: list[Any] = [nn.DataParallel(net()), torch.compile(net(), backend="eager")]
    for model in wrapped:
        with pytest.raises(ValueError, match="adapt the model inside"):
            rewire.adapt(model, density=0.2)
        with pytest.raises(ValueError, match="adapt the model inside"):
            rewire.load_adapter(model, tmp_path / "a")


def test_a_file_cannot_name_what_belongs_to_a_difference(tmp_path: Path) -> None:
    model = net()
    adapter = rewire.adapt(model, density=0.2)
    adapter.save(tmp_path / "a")
    saved = files.read(tmp_path / "a")
    values = {"0.difference.weight.values": saved.differences["0"]["values"]}
    lie = saved._replace(differences={"2": saved.differences["2"]}, parameters=values)
    files.write(tmp_path / "b", lie)
    with pytest.raises(ValueError, match="which the model does not have"):
        adapter.load(tmp_path / "b")
    assert isinstance(model[0], Adapted)
    assert list(adapter.differences) == ["0", "2"]


def test_a_merge_that_fails_changes_nothing() -> None:
    model = net()
    with torch.inference_mode():
        model[2] = nn.Linear(8, 8)
    before = model[0].weight.detach().clone()
    adapter = moved(rewire.adapt(model, density=0.2))
    with pytest.raises(RuntimeError, match="nference"):
        adapter.merge()
    assert torch.equal(model[0].weight, before)
    assert isinstance(model[0], Adapted)
    assert adapter.state == "beside"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.float32])
def test_buffers_of_any_dtype_and_shape_are_given_back(dtype: torch.dtype) -> None:
    model = net()
    model.register_buffer("b", torch.ones(3).to(dtype))
    adapter = rewire.adapt(model, density=0.2)
    model.b = torch.zeros(4).to(dtype)
    adapter.detach()
    assert model.b.shape == (3,)
    assert bool((model.b.to(torch.complex64) == 1).all())


def test_weights_with_memory_in_common_are_not_merged() -> None:
    model = net()
    model[2].weight = nn.Parameter(model[0].weight.detach().t())
    adapter = moved(rewire.adapt(model, density=0.2, only="0"))
    with pytest.raises(ValueError, match=r"^0\.weight has memory in common with 2\.weight"):
        adapter.merge()
    expanded = net()
    expanded[0].weight = nn.Parameter(torch.ones(1, 8).expand(8, 8))
    with pytest.raises(ValueError, match=r"^0\.weight is expanded"):
        rewire.adapt(expanded, density=0.2).merge()


def test_a_model_that_is_no_copy_is_not_saved(tmp_path: Path) -> None:
    adapter = rewire.adapt(net(), density=0.2)
    other = net()
    rewire.adapt(other, density=0.4)
    for model in (nn.Linear(2, 2), other):
        with pytest.raises(ValueError, match="give a copy of the adapter's model"):
            adapter.save(tmp_path / "a", model=model)
    assert not (tmp_path / "a").exists()


def test_a_second_name_of_a_tied_parameter_is_one_for_train() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(5, 8), "h": nn.Linear(8, 5), "f": nn.Linear(8, 8)})
    model["h"].weight = model["e"].weight
    adapter = rewire.adapt(model, density=0.2, only="f", train="h.weight")
    assert any(p is model["e"].weight for p in adapter.parameters())


def test_a_layer_with_two_names_goes_by_the_first() -> None:
    layer = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="several names goes by its first"):
        rewire.adapt(nn.ModuleDict({"a": layer, "b": layer}), density=0.2, only="b")

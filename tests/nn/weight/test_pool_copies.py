"""Copies, other dtypes and devices of a pool, and where it is drawn."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from rewire.nn import Event, SparseLinear, SparseWeight

# --- construction ---------------------------------------------------------------------------------


def _through_torch_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _through_torch_save]
)
def test_copies_are_independent_and_have_no_followers(
    way: Any, dormant: Any, check_pool: Any
) -> None:
    layer = SparseLinear(6, 5, connections=10, capacity=12)
    events: list[Event] = []
    layer.weight.follow(events.append)
    layer.weight.follow(lambda event: None)  # cannot be pickled
    x = torch.randn(3, 6)
    twin = way(layer)
    assert torch.equal(twin(x), layer(x))
    expected = layer(x).detach().clone()
    twin.weight.rewire(torch.tensor([0, 11]), *dormant(twin.weight, 2), 1.0)
    check_pool(twin.weight)
    check_pool(layer.weight)
    assert not events
    assert torch.equal(layer(x), expected)
    assert not torch.equal(twin(x), expected)
    layer.weight.rewire(torch.tensor([0]), *dormant(layer.weight, 1))
    assert len(events) == 1


def test_conversion_of_dtype(dormant: Any, check_pool: Any, twin: Any) -> None:
    layer = SparseLinear(6, 5, connections=10, capacity=12)
    parameter = layer.weight.values
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        assert layer.weight.values is parameter
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert layer.weight.rows.dtype == layer.weight.index.row_ptr.dtype == torch.int32
        layer.weight.rewire(torch.tensor([0]), *dormant(layer.weight, 1), 0.5)
        check_pool(layer.weight)
        x = torch.randn(3, 6, dtype=dtype)
        tolerance = {"rtol": 0.02, "atol": 0.02} if dtype.itemsize == 2 else {}
        torch.testing.assert_close(layer(x), twin(layer)(x), **tolerance)
    layer.to("cpu").float().double()
    check_pool(layer.weight)


def test_meta_device_and_back(twin: Any, check_pool: Any) -> None:
    source = SparseLinear(6, 5, connections=10)
    layer = SparseLinear(6, 5, connections=10, device="meta")
    assert layer(torch.empty(3, 6, device="meta")).shape == (3, 5)
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    check_pool(layer.weight)
    assert torch.equal(layer.weight.to_dense(), source.weight.to_dense())


def test_deferred_initialisation_draws_the_topology() -> None:
    """torch's recipe: build on meta, to_empty, reset_parameters."""
    layer = SparseLinear(20, 15, connections=60, capacity=70, device="meta").to_empty(device="cpu")
    assert not layer.weight.drawn
    layer.reset_parameters()
    assert layer.weight.drawn
    assert layer(torch.randn(4, 20)).shape == (4, 15)
    assert int(layer.weight.fan_in().sum()) == 60


@pytest.mark.parametrize("name", ["values", "rows", "cols"])
def test_loading_from_the_meta_device_changes_nothing(name: str) -> None:
    weight = SparseWeight((8, 6), connections=12)
    before = {n: t.clone() for n, t in weight.state_dict().items()}
    state = SparseWeight((8, 6), connections=12).state_dict()
    state[name] = state[name].to("meta")
    with pytest.raises(
        RuntimeError, match=f"{name} must be an ordinary tensor, not one on the meta device"
    ):
        weight.load_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in weight.state_dict().items())

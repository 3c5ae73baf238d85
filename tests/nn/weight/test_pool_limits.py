"""A weight with limits: drawn, changed, saved and loaded within them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rewire
from rewire.budget import Limits
from rewire.nn import SparseConv2d, SparseLinear, SparseWeight
from rewire.nn.weight.walk import regrow
from rewire.topology import TopologyError

LIMITS = Limits(fan_in=3, fan_out=4, block=(4, 5, 8))


def test_drawn_within_and_shown() -> None:
    weight = SparseWeight((8, 10), 20, limits=LIMITS)
    assert int(weight.fan_in().max()) <= 3
    assert int(weight.fan_out().max()) <= 4
    assert "fan-in 3, fan-out 4, 8 per block of 4 x 5" in repr(weight)
    weight.draw()
    assert int(weight.fan_in().max()) <= 3
    assert copy.deepcopy(weight).limits == LIMITS


def test_what_cannot_be_is_refused_with_the_limits() -> None:
    with pytest.raises(
        ValueError,
        match=r"25 connections do not fit a 8 x 10 matrix within "
        r"fan-in 3, .*at most 24 do",
    ):
        SparseWeight((8, 10), 25, limits=LIMITS)
    with pytest.raises(ValueError, match="at most 24"):
        SparseLinear(10, 8, density=0.5, limits=LIMITS)
    weight = SparseWeight((8, 10), 30)
    with pytest.raises(ValueError, match="at most 24"):
        weight.restrict(LIMITS)
    assert weight.limits is None


def test_a_change_that_breaks_them_is_taken_back() -> None:
    weight = SparseWeight.from_coo(
        (4, 4), torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([1.0, 2.0])
    )
    weight.restrict(Limits(fan_in=1))
    before = copy.deepcopy(weight.state_dict())
    with pytest.raises(TopologyError, match=r"row 0 has 1 connections more .* fan-in 1"):
        weight.rewire(torch.tensor([1]), torch.tensor([0]), torch.tensor([3]), 5.0)
    assert all(torch.equal(v, weight.state_dict()[k]) for k, v in before.items())
    assert weight.index.row_ptr.tolist() == [0, 1, 2, 2, 2]
    weight.rewire(torch.tensor([0, 1]), torch.tensor([3, 0]), torch.tensor([3, 2]))
    assert weight.connections == 2


def test_saved_and_checked_when_loaded() -> None:
    weight = SparseWeight((8, 10), 20, limits=LIMITS)
    plain = SparseWeight((8, 10), 20)
    plain.load_state_dict(weight.state_dict())
    assert plain.limits == LIMITS
    loose = SparseWeight((8, 10), 40)
    before = copy.deepcopy(weight.state_dict())
    with pytest.raises(RuntimeError, match="more than allowed"):
        weight.load_state_dict(loose.state_dict())
    assert all(torch.equal(v, weight.state_dict()[k]) for k, v in before.items())
    damaged = dict(weight.state_dict(), limits=torch.tensor([3, 0, 1, 1, 1]))
    with pytest.raises(RuntimeError, match="fan_out must be"):
        SparseWeight((8, 10), 20).load_state_dict(damaged)


def test_restricting_keeps_the_values_there_are() -> None:
    weight = SparseWeight((8, 10), 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight.values.copy_(torch.arange(1.0, 25.0))
    weight.restrict(LIMITS, torch.Generator().manual_seed(1))
    assert weight.fan_in().tolist() == [3] * 8
    assert sorted(weight.values.tolist()) == list(range(1, 25))
    same = weight.state_dict()["rows"].clone()
    weight.restrict(Limits(fan_in=4))  # there is nothing to do
    assert torch.equal(same, weight.rows)


def test_convolutions_have_them_too() -> None:
    layer = SparseConv2d(3, 8, 3, connections=40, limits=Limits(fan_in=5))
    assert layer.weight.fan_in().tolist() == [5] * 8


def test_sparsify_within_limits() -> None:
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.LSTM(16, 8), nn.Linear(8, 4))
    limits = {"2.weight_hh_l0": Limits(fan_in=3), "3": Limits(fan_out=1)}
    rewire.sparsify(model, density={"0": 0.5, "2": 0.2, "3": 0.25}, limits=limits)
    pools = dict(rewire.sparse_weights(model))
    assert pools["0.weight"].limits is None
    assert int(pools["2.weight_hh_l0"].fan_in().max()) <= 3
    assert pools["3.weight"].fan_out().tolist() == [1] * 8
    with pytest.raises(ValueError, match=r"0.weight: 160 connections .* at most 16"):
        rewire.sparsify(nn.Sequential(nn.Linear(20, 16)), density=0.5, limits=Limits(fan_in=1))
    with pytest.raises(ValueError, match="'1' of limits= matches no layer"):
        rewire.sparsify(
            nn.Sequential(nn.Linear(20, 16)), density=0.5, limits={"1": Limits(fan_in=1)}
        )
    with pytest.raises(ValueError, match="select='random'"):
        rewire.sparsify(
            nn.Sequential(nn.Linear(20, 16)),
            density=0.5,
            limits=Limits(fan_in=1),
            select="magnitude",
        )


def test_regrowing_blindly_is_refused() -> None:
    weight = SparseWeight((8, 10), 20, limits=LIMITS)
    signs = torch.ones(20, dtype=torch.int8)
    drawn = {"seed": 0, "step": 0, "grow_stream": 1, "sign_stream": 2, "fixed": True}
    with pytest.raises(ValueError, match="limited to fan-in 3"), torch.no_grad():
        regrow(weight, torch.tensor([0]), signs, **drawn)

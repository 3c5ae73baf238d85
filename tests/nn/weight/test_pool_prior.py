"""A weight with allowed positions and frozen connections: drawn, changed, saved and loaded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from rewire.budget import Limits
from rewire.nn import SparseLinear, SparseWeight, from_edges
from rewire.nn.weight.walk import regrow
from rewire.topology import Prior, TopologyError, active_keys

ALLOWED, FROZEN = torch.arange(0, 80, 2), torch.tensor([4, 20, 78])


def prior() -> Prior:
    made = Prior.of(8, 10, ALLOWED, FROZEN)
    assert made is not None
    return made


def keys(weight: SparseWeight) -> set[int]:
    return set(active_keys(weight.index, 10).tolist())


def test_drawn_within_and_shown() -> None:
    weight = SparseWeight((8, 10), 20, prior=prior(), start=torch.tensor([6]))
    assert {4, 6, 20, 78} <= keys(weight) <= set(range(0, 80, 2))
    assert (weight.positions, weight.dormant, weight.bound) == (40, 20, True)
    assert "40 allowed positions, 3 frozen connections" in repr(weight)
    frozen = weight.is_frozen(weight.active())
    assert int(frozen.sum()) == 3
    before = keys(weight)
    weight.draw(torch.Generator().manual_seed(1))
    assert {4, 20, 78} <= keys(weight) <= set(range(0, 80, 2))
    assert keys(weight) != before
    with pytest.raises(ValueError, match="of which 40 positions are allowed"):
        SparseWeight((8, 10), 41, prior=prior())
    with pytest.raises(ValueError, match="choose between 3 and 40"):
        SparseWeight((8, 10), 2, prior=prior())


def test_a_change_that_breaks_it_is_taken_back() -> None:
    weight = SparseWeight((8, 10), 20, prior=prior())
    state = copy.deepcopy(weight.state_dict())
    lists = [part.clone() for part in weight.index]
    active = weight.active()
    frozen, free = active[weight.is_frozen(active)], active[~weight.is_frozen(active)]
    for slots, row, col, words in (
        (free[:1], 0, 1, r"\(0, 1\) is not at one of the 40 allowed positions"),
        (frozen[:1], -1, -1, r"\(0, 4\) is frozen"),
        (frozen[1:2], 0, 0, r"frozen|more than once"),
    ):
        with pytest.raises(TopologyError, match=words):
            weight.rewire(slots, torch.tensor([row]), torch.tensor([col]))
    with pytest.raises(TopologyError, match="slot"):
        weight.rewire(torch.tensor([99]), torch.tensor([0]), torch.tensor([0]))
    assert all(torch.equal(v, weight.state_dict()[k]) for k, v in state.items())
    assert all(torch.equal(a, b) for a, b in zip(lists, weight.index, strict=True))
    # A frozen connection may move to another slot.
    slots = torch.cat([frozen[:1], free[:1]])
    weight.rewire(slots, weight.rows[slots].flip(0), weight.cols[slots].flip(0))
    assert keys(weight) == set(active_keys(weight.index, 10).tolist())
    assert bool(weight.is_frozen(free[:1]))


def test_saved_and_checked_when_loaded() -> None:
    weight = SparseWeight((8, 10), 20, prior=prior())
    state = copy.deepcopy(weight.state_dict())
    assert state["allowed"].tolist() == ALLOWED.tolist()
    assert state["frozen"].tolist() == FROZEN.tolist()
    plain = SparseWeight((8, 10), 33)
    plain.load_state_dict(state)
    assert plain.prior == weight.prior
    assert plain.state_dict().keys() == state.keys()
    # What the weight itself knows counts.
    with pytest.raises(RuntimeError, match="is not at one of the 40 allowed"):
        weight.load_state_dict(SparseWeight((8, 10), 60).state_dict())
    assert all(torch.equal(v, weight.state_dict()[k]) for k, v in state.items())
    missing = SparseWeight((8, 10), 20, prior=Prior.of(8, 10, ALLOWED), start=torch.tensor([0]))
    own = SparseWeight((8, 10), 20, prior=Prior.of(8, 10, None, torch.tensor([7])))
    with pytest.raises(RuntimeError, match=r"\(0, 7\) is frozen"):
        own.load_state_dict(missing.state_dict())
    for name, damaged in (
        ("allowed", ALLOWED.flip(0)),
        ("allowed", ALLOWED[1:]),
        ("frozen", FROZEN + 1),
        ("frozen", FROZEN.float()),
        ("frozen", torch.tensor([4, 900])),
    ):
        with pytest.raises(RuntimeError):
            SparseWeight((8, 10), 20).load_state_dict(dict(state, **{name: damaged}))


def test_copies_pickles_moves_and_sizes_keep_it() -> None:
    weight = SparseWeight((8, 10), 20, prior=prior(), capacity=25)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.double()):
        assert other.prior == prior()
        other.resize(30)
        other.reorder()
        with pytest.raises(TopologyError, match="not at one of"):
            other.rewire(torch.tensor([29]), torch.tensor([0]), torch.tensor([1]))
    assert weight.to("meta").prior == prior()  # as limits do, it outlives the tensors
    weight = weight.to_empty(device="cpu")
    weight.draw()
    assert {4, 20, 78} <= keys(weight) <= set(range(0, 80, 2))
    assert weight.state_dict()["allowed"].tolist() == ALLOWED.tolist()


def test_what_is_known_later() -> None:
    layer = SparseLinear(10, 8, connections=20)
    now = keys(layer.weight)
    some = torch.tensor(sorted(now))[:4]
    with pytest.raises(TopologyError, match="does not keep to 40 allowed positions"):
        layer.weight.expect(Prior.of(8, 10, ALLOWED))
    assert layer.weight.prior is None
    layer.weight.expect(Prior.of(8, 10, None, some))
    assert int(layer.weight.is_frozen(layer.weight.active()).sum()) == 4
    layer.weight.restrict(Limits(fan_in=4))  # a new draw if need be, with what is frozen
    assert set(some.tolist()) <= keys(layer.weight)
    layer.weight.expect(None)
    assert not layer.weight.is_frozen(layer.weight.active()).any()
    assert "frozen" not in layer.weight.state_dict()


def test_functional_calls_find_the_entries() -> None:
    layer = from_edges([(0, 1), (2, 3)], 5, 6, frozen=True, allowed=[(1, 1)])
    x = torch.randn(3, 5)
    y = torch.func.functional_call(nn.Sequential(layer), nn.Sequential(layer).state_dict(), x)
    assert torch.equal(y, layer(x))


def test_regrowing_blindly_is_refused() -> None:
    weight = SparseWeight((8, 10), 20, prior=prior())
    drawn = {"seed": 0, "step": 0, "grow_stream": 1, "sign_stream": 2, "fixed": True}
    with pytest.raises(ValueError, match="limited to 40 allowed"), torch.no_grad():
        regrow(weight, torch.tensor([0]), torch.ones(20, dtype=torch.int8), **drawn)


def test_given_edges_need_tensors() -> None:
    with pytest.raises(ValueError, match="meta device has no topology"):
        from_edges([(0, 1)], device="meta")

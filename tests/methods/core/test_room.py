"""Methods that move connections need a dormant position somewhere, and leave full layers beside
others alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewire import methods
from rewire.methods import Group, Rewirer
from rewire.methods.criteria import drop, grow
from rewire.nn import SparseLinear

#: Those that take a model of pools, from the registry, so that a new one is tested too.
POOLED = [
    n
    for n in methods.available()
    if not methods.info(n).cls.starts_dense and not methods.info(n).takes_budget
]
REWIRING = [n for n in POOLED if methods.info(n).cls.needs_room]


def made(name: str, *connections: int, **options: Any) -> methods.Method:
    """The method on layers of 4 x 4 with so many connections."""
    model = nn.Sequential(*(SparseLinear(4, 4, connections=k) for k in connections))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = {"data": [torch.randn(5, 4)]} if methods.info(name).takes_data else {}
    return methods.create(name, model, optimizer, seed=0, **data, **options)


def test_which_methods_need_room() -> None:
    assert set(POOLED) - set(REWIRING) == {"static", "soft-deep-r"}


@pytest.mark.parametrize("name", REWIRING)
def test_a_model_of_full_layers_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"0\.weight \(K = 16 of M = 16\), 1\.weight \(K = 16 of "
        r"M = 16\); give",
    ):
        made(name, 16, 16)
    made(name, 16, 15)


@pytest.mark.parametrize("name", [n for n in POOLED if n not in REWIRING])
def test_methods_that_do_not_grow_take_full_layers(name: str) -> None:
    made(name, 16)


def test_many_full_layers_are_counted() -> None:
    with pytest.raises(ValueError, match=r"4\.weight \(K = 16 of M = 16\), 3 others; give"):
        made("set", *[16] * 8)


def test_in_a_group_each_method_needs_room() -> None:
    model = nn.Sequential(SparseLinear(4, 4, connections=16), SparseLinear(4, 4, connections=8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"RigL has nothing to rewire.*0\.weight"):
        Group(model, optimizer, {"0": methods.RigL, "1": methods.SET})
    Group(model, optimizer, {"0": methods.Static, "1": methods.SET})


@pytest.mark.parametrize(
    "name", ["set", "rigl", "srigl", "codacorset", "copacorset", "mest", "itop", "ctre"]
)
def test_a_full_layer_beside_others_is_left_alone(name: str) -> None:
    method = made(
        name, 16, 8, 9, **({"every": 1} if name in ("rigl", "srigl", "mest", "itop") else {})
    )
    model, optimizer = method.model, method.optimizers[0]
    full = model[0].weight
    told: list[Any] = []
    full.follow(told.append)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        before = full.values.detach().clone()
        method.step()
        method.end_epoch()
        assert torch.equal(full.values, before)
    assert not told
    assert method.stats()["grown"]["0.weight"] == 0
    assert method.stats()["grown"]["1.weight"] > 0


def test_where_layers_share_a_full_one_may_give() -> None:
    model = nn.Sequential(SparseLinear(4, 4, connections=16), SparseLinear(4, 4, connections=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = Rewirer(
        model,
        optimizer,
        drop=drop.ByMagnitude(),
        grow=grow.Random(),
        fraction=0.5,
        every=1,
        seed=0,
        share=lambda pool, dropped: float(pool.number),
    )
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    method.step()
    assert method.count_connections() == {"0.weight": 8, "1.weight": 12}

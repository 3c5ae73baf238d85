"""Optimizers follow the pools: all of `torch.optim`, slot by slot."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from rewire.nn import SparseLinear, SparseWeight, follow_optimizer, register_initial_state

K, CAPACITY = 24, 28
# Every optimizer of torch.optim, with what makes it keep all the state it can.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ASGD": [{"t0": 1, "weight_decay": 0.1}],
    "Adadelta": [{"weight_decay": 0.1}],
    "Adafactor": [{"weight_decay": 0.1}],
    "Adagrad": [{"initial_accumulator_value": 0.5}, {"lr_decay": 0.1, "weight_decay": 0.1}],
    "Adam": [{"weight_decay": 0.1}, {"amsgrad": True}, {"foreach": False}, {"fused": True}],
    "AdamW": [{"weight_decay": 0.1}, {"amsgrad": True, "maximize": True}],
    "Adamax": [{"weight_decay": 0.1}],
    "NAdam": [{"weight_decay": 0.1}, {"decoupled_weight_decay": True}],
    "RAdam": [{"weight_decay": 0.1}],
    "RMSprop": [{"momentum": 0.9, "centered": True, "weight_decay": 0.1}],
    "Rprop": [{"lr": 0.02}],
    "SGD": [
        {"lr": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    ],
}
REFUSED = {"LBFGS", "Muon", "SparseAdam"}
# Adafactor scales its step by the root mean square over the whole parameter.
NOT_ELEMENTWISE = {"Adafactor"}
CASES = [
    pytest.param(n, o, id=f"{n}-{i}")
    for n, options in OPTIONS.items()
    for i, o in enumerate(options)
]


def all_optimizers() -> set[str]:
    found = {
        n
        for n in dir(optim)
        if isinstance(getattr(optim, n), type) and issubclass(getattr(optim, n), Optimizer)
    }
    return found - {"Optimizer"}


def test_the_list_is_complete() -> None:
    assert all_optimizers() == set(OPTIONS) | REFUSED


def pool() -> SparseWeight:
    weight = SparseWeight((6, 8), K, capacity=CAPACITY, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        weight.values.copy_(torch.linspace(-1, 1, CAPACITY) * (weight.rows >= 0))
    return weight


def follow(name: str, options: dict[str, Any], weight: SparseWeight) -> Optimizer:
    optimizer: Optimizer = getattr(optim, name)(weight.parameters(), **options)
    follow_optimizer(optimizer, [weight])
    return optimizer


def train(weight: SparseWeight, optimizer: Optimizer, steps: range) -> None:
    """Gradients are a function of position and step, 0 in empty slots."""
    for step in steps:
        g = torch.sin(weight.rows * 3.0 + weight.cols * 7.0 + step * 1.3) * (weight.rows >= 0)
        weight.values.grad = g
        optimizer.step()


def per_slot(weight: SparseWeight, optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state[weight.values]
    return {
        k: v.clone()
        for k, v in state.items()
        if isinstance(v, Tensor) and v.dim() == 1 and k != "age"
    }


def initial(name: str, options: dict[str, Any]) -> dict[str, float]:
    """What a fresh optimizer's state starts at.

    SGD makes its state in the first step, of the gradient: there it is that of a step with a
    gradient of 0.
    """
    parameter = nn.Parameter(torch.zeros(CAPACITY))
    optimizer: Any = getattr(optim, name)([parameter], **options)
    parameter.grad = torch.zeros(CAPACITY)
    lists = [[] for _ in list(inspect.signature(optimizer._init_group).parameters)[1:]]
    optimizer._init_group(optimizer.param_groups[0], *lists)
    if name == "SGD":
        optimizer.step()
    state = optimizer.state[parameter]
    return {k: float(v[0]) for k, v in state.items() if isinstance(v, Tensor) and v.dim() == 1}


@pytest.mark.parametrize(("name", "options"), CASES)
def test_state_of_changed_slots_starts_afresh_and_no_other(
    name: str, options: dict[str, Any], dormant: Any
) -> None:
    weight, other = pool(), pool()
    optimizer, undisturbed = follow(name, options, weight), follow(name, options, other)
    train(weight, optimizer, range(2))
    train(other, undisturbed, range(2))
    before = per_slot(weight, optimizer)
    scalars = {
        k: copy.deepcopy(v) for k, v in optimizer.state[weight.values].items() if k not in before
    }
    values = weight.values.detach().clone()

    slots = torch.tensor([3, 11, 20, K + 1])  # the last of them was empty
    weight.rewire(slots, *dormant(weight, 4))
    rest = torch.ones(CAPACITY, dtype=torch.bool)
    rest[slots] = False
    after, start = per_slot(weight, optimizer), initial(name, options)
    assert set(after) == set(before) == set(start)
    for key, value in after.items():
        assert value[slots].tolist() == [start[key]] * 4, key
        assert torch.equal(value[rest], before[key][rest]), key
    assert not start or any((before[key][slots] != start[key]).any() for key in start), (
        "nothing had to be done"
    )
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(optimizer.state[weight.values][k]))
        for k, v in scalars.items()
    )
    assert torch.equal(weight.values[rest], values[rest])
    assert not weight.values.grad[slots].any()

    if name not in NOT_ELEMENTWISE:
        train(weight, optimizer, range(2, 6))
        train(other, undisturbed, range(2, 6))
        assert torch.equal(weight.values[rest], other.values[rest])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_empty_slots_stay_zero(name: str, options: dict[str, Any], check_pool: Any) -> None:
    weight = pool()
    optimizer = follow(name, options, weight)
    train(weight, optimizer, range(4))
    check_pool(weight)
    weight.rewire(torch.tensor([0, 5]), torch.tensor([-1, -1]), torch.tensor([-1, -1]))
    train(weight, optimizer, range(4, 10))
    check_pool(weight)
    assert weight.connections == K - 2


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("capacity", [40, 25, K])
@pytest.mark.parametrize("passed", [True, False])
def test_resize_carries_state(
    name: str, options: dict[str, Any], capacity: int, passed: bool
) -> None:
    """Whether the optimizer follows the pool or is passed to resize: training goes on as if nothing
    had happened.
    """
    weight, other = pool(), pool()
    optimizer, undisturbed = follow(name, options, weight), follow(name, options, other)
    if passed:
        weight._followers.clear()
    train(weight, optimizer, range(3))
    train(other, undisturbed, range(3))
    weight.resize(capacity, [optimizer] if passed else [])
    assert all(v.numel() == capacity for v in per_slot(weight, optimizer).values())
    train(weight, optimizer, range(3, 6))
    train(other, undisturbed, range(3, 6))
    if name not in NOT_ELEMENTWISE:
        assert torch.equal(weight.to_dense(), other.to_dense())
    start = initial(name, options)
    for key, value in per_slot(weight, optimizer).items():
        blank = value[weight.rows < 0]
        assert key == "ax" or blank.tolist() == pytest.approx(
            [start[key]] * blank.numel(), abs=1e-7
        ), key


@pytest.mark.parametrize(("name", "options"), CASES)
def test_reorder_does_not_disturb_training(name: str, options: dict[str, Any]) -> None:
    weight, other = pool(), pool()
    shuffle = torch.randperm(CAPACITY, generator=torch.Generator().manual_seed(2))
    for w in (weight, other):
        rows, cols, values = (
            w.rows[shuffle].clone(),
            w.cols[shuffle].clone(),
            w.values.detach()[shuffle].clone(),
        )
        w.rewire(torch.arange(CAPACITY), torch.full_like(rows, -1), torch.full_like(cols, -1))
        w.rewire(torch.arange(CAPACITY), rows, cols, values)
    optimizer, undisturbed = follow(name, options, weight), follow(name, options, other)
    train(weight, optimizer, range(3))
    train(other, undisturbed, range(3))
    weight.reorder()
    assert not torch.equal(weight.rows, other.rows)
    train(weight, optimizer, range(3, 6))
    train(other, undisturbed, range(3, 6))
    if name in NOT_ELEMENTWISE:
        torch.testing.assert_close(weight.to_dense(), other.to_dense())
    else:
        assert torch.equal(weight.to_dense(), other.to_dense())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_optimizers_that_cannot_are_refused_by_name(name: str) -> None:
    layer = SparseLinear(6, 5, connections=10, bias=False)
    parameters = [nn.Parameter(torch.ones(2, 2))] if name == "Muon" else layer.parameters()
    optimizer = getattr(optim, name)(parameters)
    with pytest.raises(ValueError, match=f"{name} cannot train sparse weights: .* SGD or Adam"):
        follow_optimizer(optimizer, [layer.weight])


def test_an_optimizer_from_elsewhere_can_declare_its_state(dormant: Any) -> None:
    class Own(optim.Adam):
        pass

    weight = pool()
    optimizer = Own(weight.parameters(), lr=0.25)
    follow_optimizer(optimizer, [weight])
    register_initial_state("Own", "exp_avg_sq", lambda group: 2 * group["lr"])
    train(weight, optimizer, range(2))
    weight.rewire(torch.tensor([4]), *dormant(weight, 1))
    state = per_slot(weight, optimizer)
    assert state["exp_avg_sq"][4] == 0.5
    assert state["exp_avg"][4] == 0


def test_only_trained_pools_are_followed_and_the_optimizer_is_not_kept_alive(dormant: Any) -> None:
    a, b = pool(), pool()
    optimizer = optim.Adam(a.parameters())
    handles = follow_optimizer(optimizer, [a, b])
    assert len(handles) == 1
    train(a, optimizer, range(1))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    a.rewire(torch.tensor([0]), *dormant(a, 1))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_following_twice_moves_state_once(times: int, dormant: Any) -> None:
    """A user and a method, or two methods, may follow for the same optimizer."""
    weight = pool()
    optimizer = optim.Adam(weight.parameters())
    handles = [follow_optimizer(optimizer, [weight])[0] for _ in range(times)]
    shuffle = torch.randperm(K, generator=torch.Generator().manual_seed(2))
    weight.rewire(
        torch.arange(K), weight.rows[:K][shuffle].clone(), weight.cols[:K][shuffle].clone(), 0.5
    )
    train(weight, optimizer, range(1))
    for change in (
        weight.reorder,
        lambda: weight.resize(40),
        lambda: weight.resize(K),
        weight.reorder,
    ):
        change()
        expected = 0.1 * torch.sin(weight.rows * 3.0 + weight.cols * 7.0) * (weight.rows >= 0)
        torch.testing.assert_close(per_slot(weight, optimizer)["exp_avg"], expected)
    handles[0].remove()
    weight.rewire(torch.tensor([5]), *dormant(weight, 1))
    assert (per_slot(weight, optimizer)["exp_avg"][5] == 0) == (times > 1)


def test_a_removed_handle_ends_it(dormant: Any) -> None:
    weight = pool()
    optimizer = optim.SGD(weight.parameters(), lr=0.1, momentum=0.9)
    [handle] = follow_optimizer(optimizer, [weight])
    train(weight, optimizer, range(1))
    handle.remove()
    before = per_slot(weight, optimizer)
    weight.rewire(torch.tensor([0]), *dormant(weight, 1))
    assert torch.equal(per_slot(weight, optimizer)["momentum_buffer"], before["momentum_buffer"])


def test_pools_of_one_slot(dormant: Any) -> None:
    weight = SparseWeight((3, 3), 1)
    optimizer = optim.Adam(weight.parameters())
    follow_optimizer(optimizer, [weight])
    train(weight, optimizer, range(2))
    weight.rewire(torch.tensor([0]), *dormant(weight, 1))
    state = optimizer.state[weight.values]
    assert (float(state["step"]), float(state["exp_avg"]), float(state["exp_avg_sq"])) == (2, 0, 0)

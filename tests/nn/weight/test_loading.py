"""state_dict: what is in it, what is refused, and that training goes on from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn, optim

from rewire.nn import SparseLinear, SparseWeight, follow_optimizer

State = dict[str, Tensor]


def make(connections: int = 10, **more: Any) -> SparseLinear:
    return SparseLinear(6, 5, connections=connections, **more)


def test_keys_and_round_trip(check_pool: Any) -> None:
    source, target = make(capacity=12), make(capacity=12)
    state = source.state_dict()
    assert set(state) == {"weight.values", "weight.rows", "weight.cols", "weight.shape", "bias"}
    parameter, pointer = target.weight.values, target.weight.values.data_ptr()
    held = [t.data_ptr() for t in target.weight.index]
    assert not target.load_state_dict(state).missing_keys
    check_pool(target.weight)
    for key, value in target.state_dict().items():
        assert torch.equal(value, state[key])
    assert target.weight.values is parameter
    assert parameter.data_ptr() == pointer
    assert [t.data_ptr() for t in target.weight.index] == held
    x = torch.randn(3, 6)
    assert torch.equal(target(x), source(x))


def test_round_trip_through_safetensors(check_pool: Any) -> None:
    model = nn.Sequential(make(), nn.ReLU(), SparseLinear(5, 4, density=0.5))
    again = nn.Sequential(make(), nn.ReLU(), SparseLinear(5, 4, density=0.5))
    again.load_state_dict(from_safetensors(to_safetensors(model.state_dict())))
    check_pool(again[0].weight)
    x = torch.randn(3, 6)
    assert torch.equal(again(x), model(x))


def test_a_file_of_another_dtype_and_index_width(check_pool: Any) -> None:
    source, target = make(dtype=torch.float64), make()
    state = source.state_dict() | {
        k: source.state_dict()[k].long() for k in ("weight.rows", "weight.cols")
    }
    target.load_state_dict(state)
    check_pool(target.weight)
    assert target.weight.dtype == torch.float32
    assert target.weight.rows.dtype == torch.int32
    assert torch.equal(target.weight.to_dense(), source.weight.to_dense().float())


def test_values_that_an_optimizer_left_in_empty_slots_are_not_loaded(check_pool: Any) -> None:
    source, target = make(capacity=14), make(capacity=14)
    nn.init.ones_(source.weight.values)
    target.load_state_dict(source.state_dict())
    check_pool(target.weight)
    assert torch.equal(target.weight.to_dense(), source.weight.to_dense())


def without(*keys: str) -> Callable[[State], State]:
    return lambda s: {k: v for k, v in s.items() if k not in keys}


def changed(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda s: s | {key: value(s[key].clone())}


def put(slot: int, number: float) -> Callable[[Tensor], Tensor]:
    def apply(t: Tensor) -> Tensor:
        t[slot] = number
        return t

    return apply


def duplicate(s: State) -> State:
    return s | {k: put(1, int(s[k][0]))(s[k].clone()) for k in ("weight.rows", "weight.cols")}


def dense_form(s: State) -> State:
    return {"weight": torch.randn(5, 6), "bias": s["bias"]}


BAD: dict[str, tuple[Callable[[State], State], str]] = {
    "row out of range": (
        changed("weight.rows", put(0, 5)),
        r"weight: connection \(5, \d\) is outside the 5 x 6 matrix",
    ),
    "column out of range": (changed("weight.cols", put(0, 6)), r"connection \(\d, 6\) is outside"),
    "half-empty slot": (changed("weight.cols", put(0, -1)), r"connection \(\d, -1\) is outside"),
    "far beyond": (
        changed("weight.cols", lambda t: put(0, 2**40)(t.long())),
        r"1099511627776\) "
        r"is outside",
    ),
    "duplicate": (duplicate, r"weight: connection \(\d, \d\) occurs more than once"),
    "other lengths": (changed("weight.rows", lambda t: t[:-1]), "1-D and equally long"),
    "2-D values": (changed("weight.values", lambda t: t[None]), "1-D and equally long"),
    "positions that are no integers": (
        changed("weight.rows", lambda t: t.float()),
        "rows and cols must be integers",
    ),
    "values that are integers": (
        changed("weight.values", lambda t: t.long()),
        "values floating-point",
    ),
    "another shape": (
        changed("weight.shape", put(0, 7)),
        r"saved with shape \(7, 6\), but this "
        r"weight is \(5, 6\)",
    ),
    "complex positions": (
        changed("weight.rows", lambda t: t.to(torch.complex64)),
        "rows and cols must be integers",
    ),
    "a shape of one number": (
        changed("weight.shape", lambda t: t[0]),
        r"saved with shape \(5,\), but this "
        r"weight",
    ),
    "limits of one number": (
        lambda s: s | {"weight.limits": torch.tensor(5)},
        "limits are five numbers, not 1",
    ),
    "no rows": (without("weight.rows"), r"topology is incomplete, weight.rows is missing"),
    "no topology": (without("weight.rows", "weight.cols"), r"weight.rows, weight.cols is missing"),
    "no values": (without("weight.values"), r"weight.values is missing"),
    "a dense checkpoint": (
        dense_form,
        r"weight is dense, and .* saved as values, rows and cols: .* "
        r"rewire.sparsify",
    ),
    "nothing of it": (
        without("weight.values", "weight.rows", "weight.cols"),
        r"Missing "
        r'key.*"weight.values"',
    ),
    "something else": (lambda s: s | {"weight.mask": s["bias"]}, r'Unexpected key.*"weight.mask"'),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_loaded_says_why_and_leaves_the_weight(name: str, check_pool: Any) -> None:
    spoil, message = BAD[name]
    source, target = make(), make()
    before = {k: v.clone() for k, v in target.weight.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(spoil(source.state_dict()))
    check_pool(target.weight)
    if name != "something else":  # as in PyTorch, what fits is loaded before the complaint
        assert all(torch.equal(v, before[k]) for k, v in target.weight.state_dict().items())


def test_the_message_names_the_layer() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(make()))
    state = model.state_dict()
    del state["1.0.weight.cols"]
    with pytest.raises(RuntimeError, match=r"1\.0\.weight: .*1\.0\.weight\.cols is missing"):
        model.load_state_dict(state)


def test_assign_is_refused() -> None:
    source, target = make(), make()
    parameter = target.weight.values
    with pytest.raises(RuntimeError, match="load without assign"):
        target.load_state_dict(source.state_dict(), assign=True)
    assert target.weight.values is parameter


def test_strict_false() -> None:
    source, target = make(), make()
    before = target.weight.to_dense().detach().clone()
    result = target.load_state_dict(
        without("weight.values", "weight.rows", "weight.cols")(source.state_dict()), strict=False
    )
    assert set(result.missing_keys) == {"weight.values", "weight.rows", "weight.cols"}
    assert torch.equal(target.weight.to_dense(), before)
    assert torch.equal(target.bias, source.bias)
    target.load_state_dict(source.state_dict() | {"weight.mask": torch.ones(1)}, strict=False)
    assert torch.equal(target.weight.to_dense(), source.weight.to_dense())
    # what is there must still be whole
    for spoil in (without("weight.rows"), duplicate, dense_form):
        with pytest.raises(RuntimeError):
            target.load_state_dict(spoil(source.state_dict()), strict=False)


def test_a_bare_pool_and_files_without_shape() -> None:
    source, target = SparseWeight((5, 6), 10), SparseWeight((5, 6), 10)
    state = source.state_dict()
    del state["shape"]
    target.load_state_dict(state)
    assert target.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("k", [4, 17, 30])
@pytest.mark.parametrize("followed", [True, False])
def test_another_k_resizes_and_training_goes_on(k: int, followed: bool, check_pool: Any) -> None:
    target, source = make(), make(k, capacity=min(30, k + 3))
    optimizer: optim.Optimizer = optim.SGD(target.parameters(), lr=0.01)
    if followed:
        optimizer = optim.Adam(target.parameters(), lr=0.01)
        follow_optimizer(optimizer, [target.weight])
    parameter = target.weight.values
    x = torch.randn(4, 6)
    target(x).pow(2).sum().backward()
    optimizer.step()
    target.load_state_dict(source.state_dict())
    check_pool(target.weight)
    assert target.weight.values is parameter
    assert parameter.grad is None
    assert (target.weight.connections, target.weight.capacity) == (k, min(30, k + 3))
    assert torch.equal(target(x), source(x))
    before = target(x).pow(2).sum()
    for _ in range(3):
        optimizer.zero_grad()
        target(x).pow(2).sum().backward()
        optimizer.step()
    assert target(x).pow(2).sum() < before
    check_pool(target.weight)


def test_gradients_of_connections_that_are_gone_do_not_stay() -> None:
    target = make()
    source = copy.deepcopy(target)
    free = (source.weight.to_dense() == 0).nonzero()[0]
    source.weight.rewire(torch.tensor([2]), free[:1], free[1:], 0.5)
    target.weight.values.grad = torch.ones(10)
    target.load_state_dict(source.state_dict())
    assert target.weight.values.grad.tolist() == [1, 1, 0] + [1] * 7


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.Adagrad, optim.Rprop])
@pytest.mark.parametrize("k", [10, 13])
@pytest.mark.parametrize("model_first", [True, False])
def test_order_of_loading_model_and_optimizer_does_not_matter(
    kind: Any, k: int, model_first: bool
) -> None:
    """Continue a run of K = k in a fresh model whose K is 10 (or that has trained already)."""
    torch.manual_seed(1)
    x, y = torch.randn(8, 6), torch.randn(8, 5)
    more = {"momentum": 0.9} if kind is optim.SGD else {}

    def start(layer: SparseLinear) -> optim.Optimizer:
        optimizer: optim.Optimizer = kind(layer.parameters(), lr=0.05, **more)
        follow_optimizer(optimizer, [layer.weight])
        return optimizer

    def train(layer: SparseLinear, optimizer: optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (layer(x) - y).pow(2).mean().backward()
            optimizer.step()

    source = make(k)
    optimizer = start(source)
    train(source, optimizer, 3)
    saved = copy.deepcopy((source.state_dict(), optimizer.state_dict()))
    train(source, optimizer, 3)
    for warm in (0, 2):
        target = make()
        again = start(target)
        train(target, again, warm)
        loads = [
            lambda m=target: m.load_state_dict(saved[0]),
            lambda o=again: o.load_state_dict(copy.deepcopy(saved[1])),
        ]
        for load in loads if model_first else loads[::-1]:
            load()
        train(target, again, 3)
        for key, value in target.state_dict().items():
            assert torch.equal(value, source.state_dict()[key])

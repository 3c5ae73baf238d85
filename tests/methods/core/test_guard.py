"""A method notices, within an epoch, that something else trains its weights, and what comes in or
goes; not skips.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from rewire import methods
from rewire.nn import SparseLinear, SparseWeight, sparsify
from wrappers import OPTIMIZERS as WRAPPERS

UNSEEN = "no step of the method's optimizer was seen, but .*changed: something else trains them"


def network() -> nn.Sequential:
    g = torch.Generator().manual_seed(3)
    return nn.Sequential(
        SparseLinear(12, 16, connections=40, generator=g),
        nn.ReLU(),
        SparseLinear(16, 6, connections=30, generator=g),
    )


def momentum(parameters: Any) -> optim.Optimizer:
    return optim.SGD(parameters, 0.1, momentum=0.9)


class Training:
    """A model, an optimizer or several, and a method; epochs of 4 steps."""

    def __init__(
        self, name: str, model: nn.Module | None = None, optimizer: Any = None, **settings: Any
    ) -> None:
        self.model = network() if model is None else model
        self.optimizers = [momentum(self.model.parameters())] if optimizer is None else [optimizer]
        if isinstance(optimizer, list):
            self.optimizers = optimizer
        data = {"data": [torch.randn(8, 12)]} if methods.info(name).takes_data else {}
        self.method = methods.create(name, self.model, self.optimizers, seed=1, **data, **settings)
        self.time = 0

    def backward(self) -> None:
        g = torch.Generator().manual_seed(self.time)
        self.time += 1
        x, y = torch.randn(8, 12, generator=g), torch.randint(0, 6, (8,), generator=g)
        self.model.zero_grad()
        (nn.functional.cross_entropy(self.model(x), y) + self.method.penalty()).backward()

    def step(self, call: bool = True) -> None:
        self.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if call:
            self.method.step()

    def epoch(self, call: bool = True, steps: int = 4) -> None:
        for _ in range(steps):
            self.step(call)
        self.method.end_epoch()


METHODS: dict[str, dict[str, Any]] = {
    "set": {},
    "rigl": {"every": 2},
    "deep-r": {},
    "snfs": {"window": 2},
    "corset": {},
    "top-kast": {"every": 2},
    "gmp": {"density": 0.1, "every": 3, "until": 20},
    "static": {},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("call", [True, False], ids=["step", "end-epoch-only"])
def test_an_optimizer_replaced_in_mid_training_is_noticed_within_an_epoch(
    name: str, call: bool
) -> None:
    run = Training(name, **METHODS[name])
    run.epoch()
    run.epoch(call)
    before = run.method.stats()
    run.optimizers = [optim.Adam(run.model.parameters(), 1e-2)]
    with pytest.raises(RuntimeError, match=UNSEEN):
        run.epoch(call)
    assert run.method.stats() == before


@pytest.mark.parametrize("name", ["halo", "ternary"])
def test_methods_that_start_dense_notice_it_too(name: str) -> None:
    run = Training(name, nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6)))
    run.epoch()
    run.optimizers = [optim.Adam(run.model.parameters(), 1e-2)]
    with pytest.raises(RuntimeError, match=UNSEEN):
        run.epoch()


@pytest.mark.parametrize("name", METHODS)
def test_one_of_two_optimizers_replaced_is_noticed(name: str) -> None:
    model = network()
    run = Training(
        name,
        model,
        [momentum(model[0].parameters()), momentum(model[2].parameters())],
        **METHODS[name],
    )
    run.epoch()
    run.optimizers = [run.optimizers[0], momentum(model[2].parameters())]
    with pytest.raises(RuntimeError, match=r"but 2.weight.values changed"):
        run.epoch()


def test_pools_that_take_no_part_in_steps_are_fine() -> None:
    """Frozen ones, those that get no gradient, and those of another optimizer, whose turn comes
    later.
    """
    frozen = Training("rigl", every=2)
    frozen.model[2].requires_grad_(False)  # type: ignore[index]
    frozen.epoch(steps=10)
    model = network()
    turns = Training(
        "rigl", model, [momentum(model[0].parameters()), momentum(model[2].parameters())], every=2
    )
    for time in range(12):
        turns.backward()
        turns.optimizers[time // 3 % 2].step()
        turns.method.step()
        if time == 7:
            with torch.no_grad():
                model[0].weight.rewire(torch.tensor([0]), *dormant(model[0].weight), 0.5)
    turns.method.end_epoch()


def dormant(weight: SparseWeight) -> tuple[Tensor, Tensor]:
    row, col = (weight.to_dense() == 0).nonzero()[-1:].T
    return row, col


class ByHand(optim.SGD):
    """An optimizer with a real step of another name, and nothing inside."""

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("name", METHODS)
def test_an_optimizer_that_steps_by_another_name_is_noticed(name: str) -> None:
    model = network()
    optimizer = ByHand(model.parameters(), 0.1)
    run = Training(name, model, optimizer, **METHODS[name])
    for _ in range(1):
        run.backward()
        optimizer.second_step()
        run.method.step()
    run.backward()
    optimizer.second_step()
    with pytest.raises(RuntimeError, match=UNSEEN):
        run.method.step()


def test_a_wrapper_whose_inner_optimizer_steps_by_another_name_is_noticed() -> None:
    model = network()
    optimizer = WRAPPERS["wrapper"](model.parameters())
    optimizer.base = ByHand(model.parameters(), 0.1)
    run = Training("set", model, optimizer)
    run.backward()
    optimizer.base.second_step()
    run.method.step()
    run.backward()
    optimizer.base.second_step()
    with pytest.raises(RuntimeError, match=UNSEEN):
        run.method.step()


@pytest.mark.parametrize("name", METHODS)
def test_steps_that_a_scaler_skips_are_none_however_many(name: str) -> None:
    run = Training(name, **METHODS[name])
    run.epoch()
    before, values = run.method.stats(), copy.deepcopy(run.model.state_dict())
    for _ in range(9):
        run.backward()
        run.method.step()  # no optimizer.step()
    with pytest.warns(UserWarning, match="none of the 9 optimizer steps of this epoch was made"):
        run.method.end_epoch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.method.end_epoch()  # nothing was asked for, nothing was trained
    if name in ("rigl", "deep-r", "gmp", "static", "top-kast", "snfs"):
        assert run.method.stats() == before
        assert all(torch.equal(v, values[k]) for k, v in run.model.state_dict().items())
    run.epoch()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["set", "rigl", "deep-r", "ternary"])
def test_a_grad_scaler_that_finds_infinities(name: str, fused: bool) -> None:
    """A fused optimizer steps all the same and moves nothing: that is no step."""
    dense = methods.info(name).cls.starts_dense
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6)) if dense else network()
    optimizer = optim.Adam(model.parameters(), 0.01, fused=fused)
    run = Training(name, model, optimizer, **METHODS.get(name, {}))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for time in range(8):
        run.model.zero_grad()
        loss = run.model(torch.randn(8, 12)).square().mean()
        scaler.scale(loss + run.method.penalty()).backward()
        if time in (2, 3, 5):
            next(iter(model.parameters())).grad[0] = torch.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        before = copy.deepcopy(model.state_dict())
        run.method.step()
        if time in (2, 3, 5):
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert run.method.stats()["steps"] == 5
    run.method.end_epoch()


# --- what comes in or goes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_pool_that_comes_in_later_is_refused_by_name(name: str) -> None:
    model = network()
    model[0].requires_grad_(False)
    run = Training(name, model, momentum(model[2].parameters()), **METHODS[name])
    run.step()
    model[0].requires_grad_(True)
    run.optimizers[0].add_param_group({"params": list(model[0].parameters())})
    with pytest.raises(
        RuntimeError,
        match=r"0.weight.values is trained now, but the method was "
        r"made when it was not",
    ):
        run.step()
    run.method.finalize() if run.method.updates else None
    again = Training(name, model, run.optimizers[0], **METHODS[name])  # what the error says
    again.step()
    assert set(again.method.count_connections()) == {"0.weight", "2.weight"}


def test_it_is_refused_with_an_optimizer_of_its_own_too() -> None:
    model = network()
    model[0].requires_grad_(False)
    run = Training("set", model, momentum(model[2].parameters()))
    run.epoch()
    model[0].requires_grad_(True)
    other = momentum(model[0].parameters())
    for _ in range(4):
        run.step()
        other.step()
    with pytest.raises(RuntimeError, match=r"0.weight.values is trained now"):
        run.method.end_epoch()


def test_layers_made_sparse_later_are_refused_too() -> None:
    model = nn.Sequential(SparseLinear(12, 16, connections=40), nn.ReLU(), nn.Linear(16, 6))
    run = Training("set", model)
    run.epoch()
    sparsify(model, density=0.5)
    with pytest.raises(RuntimeError, match=r"2.weight.values is trained now"):
        run.epoch()


@pytest.mark.parametrize("name", METHODS)
def test_a_frozen_pool_in_the_optimizer_joins_when_it_is_unfrozen(name: str) -> None:
    model = network()
    model[0].requires_grad_(False)
    run = Training(name, model, **METHODS[name])
    values = model[0].weight.values.detach().clone()
    run.epoch()
    assert torch.equal(model[0].weight.values, values)
    model[0].requires_grad_(True)
    run.epoch()
    run.epoch()
    stats = run.method.stats()
    assert not torch.equal(model[0].weight.values[: values.numel()], values)
    if name not in ("static", "deep-r", "top-kast"):
        assert stats["dropped"]["0.weight"] > 0


def test_other_groups_may_come_and_change_places() -> None:
    model = network()
    head = nn.Linear(6, 6)
    run = Training("set", model)
    run.step()
    [optimizer] = run.optimizers
    optimizer.add_param_group({"params": list(head.parameters())})
    run.step()
    optimizer.param_groups.reverse()
    optimizer.param_groups[-1]["lr"] = 0.025
    run.step()
    assert run.method.pools[0].lr == 0.025
    run.epoch()


def test_a_pool_that_nothing_trains_any_more_is_refused_by_name() -> None:
    run = Training("set")
    run.epoch()
    params = run.optimizers[0].param_groups[0]["params"]
    run.optimizers[0].param_groups[0]["params"] = [
        p for p in params if p is not run.model[0].weight.values
    ]  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"0.weight.values is in no parameter group .* any more"):
        run.step()


def test_groups_of_methods_refuse_the_same() -> None:
    model = nn.Sequential(*network(), SparseLinear(6, 6, connections=12))
    model[0].requires_grad_(False)
    optimizer = momentum([p for layer in model[1:] for p in layer.parameters()])
    group = methods.Group(
        model, optimizer, {"2": methods.SET, "3": partial(methods.RigL, every=2)}, seed=1
    )

    def step(optimizer: optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        group.step()

    step(optimizer)  # the other method's pool is no stranger
    group.end_epoch()
    other = momentum([p for layer in model[1:] for p in layer.parameters()])
    step(other)
    with pytest.raises(RuntimeError, match=UNSEEN):
        step(other)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    with pytest.raises(RuntimeError, match=r"0.weight.values is trained now"):
        step(optimizer)


# --- resuming, loading ----------------------------------------------------------------------------


@pytest.mark.parametrize("model_first", [True, False])
def test_a_resumed_method_may_begin_with_the_end_of_an_epoch(model_first: bool) -> None:
    first = Training("set")
    for _ in range(4):
        first.step()
    saved = copy.deepcopy((first.model.state_dict(), first.method.state_dict()))
    second = Training("set", sparse_twin())
    if model_first:
        second.model.load_state_dict(saved[0])
    second.method.load_state_dict(saved[1])
    if not model_first:
        second.model.load_state_dict(saved[0])
    second.method.end_epoch()
    first.method.end_epoch()
    assert second.method.stats() == first.method.stats()
    second.optimizers = [momentum(second.model.parameters())]
    with pytest.raises(RuntimeError, match=UNSEEN):
        second.epoch(call=False)


def sparse_twin() -> nn.Module:
    g = torch.Generator().manual_seed(99)
    return nn.Sequential(
        SparseLinear(12, 16, connections=40, generator=g),
        nn.ReLU(),
        SparseLinear(16, 6, connections=30, generator=g),
    )


def test_loading_between_skipped_steps_is_no_training() -> None:
    run = Training("set")
    run.epoch()
    saved = copy.deepcopy(run.model.state_dict())
    run.epoch()
    run.backward()
    run.method.step()
    run.model.load_state_dict(saved)
    run.backward()
    run.method.step()
    run.epoch()


def test_the_first_epoch_without_any_step_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match="no step of the method's optimizer was seen before the end of the epoch"
    ):
        Training("set").method.end_epoch()


def test_values_of_every_dtype_have_a_fingerprint() -> None:
    from rewire.methods.core.watch import fingerprint

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64):
        values: Tensor = torch.linspace(-1, 1, 33).to(dtype)
        before = fingerprint(values)
        assert fingerprint(values.clone()) == before
        values[7] += 0.5
        assert fingerprint(values) != before
    assert fingerprint(torch.zeros(0)) == 0
    assert fingerprint(torch.zeros(3, device="meta")) == 0

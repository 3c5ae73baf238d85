"""PyTorch's AveragedModel with averaging functions of ours, against our own average and means kept
by hand.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, update_bn

import rewire
from rewire.ema import ExponentialMovingAverage, get_ema_multi_avg_fn, get_swa_multi_avg_fn

METHODS: dict[str, dict[str, Any]] = {
    "set": {},
    "deep-r": {"l1": 0.05, "noise": 0.1},
    "rigl": {"every": 3},
    "snfs": {"every": 3},
    "static": {},
}


def make() -> nn.Sequential:
    g = torch.Generator().manual_seed(0)
    return nn.Sequential(
        rewire.nn.SparseLinear(12, 10, density=0.3, generator=g),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        rewire.nn.SparseLinear(10, 4, density=0.5, generator=g),
    )


def batch(step: int) -> Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, method: rewire.methods.Method, step: int) -> None:
    optimizer = method.optimizers[0]
    optimizer.zero_grad()
    (model(batch(step)) - 1).square().mean().backward()
    optimizer.step()
    method.step()


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_equals_our_own_average(name: str, use_buffers: bool) -> None:
    torch.manual_seed(0)
    model = make()
    method = rewire.methods.create(
        name, model, optim.SGD(model.parameters(), 0.1), seed=1, **METHODS[name]
    )
    averaged = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(model, 0.9), use_buffers=use_buffers
    )
    mean = None
    for step in range(24):
        train(model, method, step)
        averaged.update_parameters(model)
        if mean is None:  # AveragedModel begins with its first update
            mean, ours = model[1].running_mean.clone(), ExponentialMovingAverage(model, 0.9)
        else:
            mean.lerp_(model[1].running_mean, 0.1)
            ours.update()
        if step in (0, 1, 7, 23):  # used early, late, and twice without an update between
            expected = copy.deepcopy(model)
            ours.copy_to(expected)
            inner = averaged.module
            assert torch.equal(inner[0].weight.to_dense() != 0, expected[0].weight.to_dense() != 0)
            for at in (0, 3):
                torch.testing.assert_close(
                    inner[at].weight.to_dense(), expected[at].weight.to_dense()
                )
                torch.testing.assert_close(inner[at].bias, expected[at].bias)
            torch.testing.assert_close(
                inner[1].running_mean, mean if use_buffers else model[1].running_mean
            )
            assert int(inner[1].num_batches_tracked) == step + 1
            expected[1].load_state_dict(inner[1].state_dict())
            for _ in range(2):
                torch.testing.assert_close(averaged.eval()(batch(99)), expected.eval()(batch(99)))
            averaged.train()
        if step % 4 == 3:
            method.end_epoch()
    update_bn([batch(i) for i in range(3)], averaged)
    again = AveragedModel(make(), use_buffers=use_buffers)
    again.load_state_dict(averaged.state_dict())
    torch.testing.assert_close(again.eval()(batch(5)), averaged.eval()(batch(5)))


def test_the_mean_of_the_values_of_each_connection() -> None:
    torch.manual_seed(0)
    model = make()
    method = rewire.methods.SET(model, optim.SGD(model.parameters(), 0.1), seed=1)
    averaged = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn(model))
    weight = model[0].weight
    # where one has grown, perhaps as it was there before
    again = torch.zeros(weight.shape, dtype=torch.bool)
    grown = torch.tensor(True)
    weight.follow(lambda e: again.index_put_((weight.rows[e.slots], weight.cols[e.slots]), grown))
    values = []
    for step in range(16):
        train(model, method, step)
        if step % 4 == 3:
            averaged.update_parameters(model)  # once an epoch, before the topology changes
            values.append(model[0].weight.to_dense().detach().clone())
            method.end_epoch(last=step == 15)
    stayed = torch.stack([v != 0 for v in values]).all(0) & ~again
    assert 0 < int(stayed.sum()) < model[0].weight.connections
    found = averaged.module[0].weight.to_dense().detach()
    torch.testing.assert_close(found[stayed], torch.stack(values).mean(0)[stayed])
    assert torch.equal(found != 0, values[-1] != 0)
    torch.testing.assert_close(averaged.module[3].bias.shape, model[3].bias.shape)


def test_pools_may_be_resized_and_sorted() -> None:
    model = make()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(model, 0.5))
    averaged.update_parameters(model)
    ours = ExponentialMovingAverage(model, 0.5)
    weight = model[0].weight
    for change in (
        lambda: weight.resize(50),
        weight.reorder,
        lambda: grow(weight),
        lambda: weight.resize(44),
    ):
        with torch.no_grad():
            weight.values.mul_(1.5)
        change()
        averaged.update_parameters(model)
        ours.update()
        expected = copy.deepcopy(model)
        ours.copy_to(expected)
        assert averaged.module[0].weight.capacity == weight.capacity
        torch.testing.assert_close(
            averaged.module[0].weight.to_dense(), expected[0].weight.to_dense()
        )
        assert torch.isfinite(averaged(batch(1))).all()


def grow(weight: rewire.nn.SparseWeight) -> None:
    free = (weight.to_dense() == 0).nonzero()[:2]
    weight.rewire(torch.tensor([2, 40]), free[:, 0], free[:, 1], 0.25)


def test_what_is_dropped_and_grown_again_starts_afresh() -> None:
    model = make()
    weight = model[0].weight
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(model, 0.5))
    for _ in range(2):
        averaged.update_parameters(model)
    weight.rewire(torch.tensor([3]), weight.rows[3:4].clone(), weight.cols[3:4].clone(), 7.0)
    averaged.update_parameters(model)
    assert averaged.module[0].weight.to_dense()[weight.rows[3], weight.cols[3]] == 7.0


def test_only_what_ours_feeds_is_trusted() -> None:
    torch.manual_seed(0)
    model = make()
    method = rewire.methods.SET(model, optim.SGD(model.parameters(), 0.1), seed=1)
    before = copy.deepcopy(model)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(model))
    for step in range(4):
        train(model, method, step)
    method.end_epoch()
    with torch.no_grad():
        for a, b in zip(
            [*before.parameters(), *before.buffers()],
            [*model.parameters(), *model.buffers()],
            strict=True,
        ):
            a.copy_(b)
    averaged.update_parameters(model)
    twin = copy.deepcopy(model)
    averaged.eval(), model.eval()
    assert torch.equal(averaged(batch(1)), model(batch(1)))  # the first update is a copy
    with pytest.raises(rewire.topology.TopologyError, match="written by other code"):
        before(batch(1))
    model.train()
    train(model, method, 5)
    method.end_epoch()
    assert torch.equal(twin.eval()(batch(2)), twin(batch(2)))
    with torch.no_grad():
        averaged.module[0].weight.cols.copy_(model[0].weight.cols)
    with pytest.raises(rewire.topology.TopologyError, match="written by other code"):
        averaged(batch(1))


def test_other_structures_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(model, 0.5))
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module[0].weight, model[0].weight)
    rewire.nn.surgery.remove_units(model, {"0": [1]}, batch(0))
    with pytest.raises(RuntimeError, match=r"were cut or replaced .* make a new AveragedModel"):
        averaged.update_parameters(model)
    with pytest.raises(ValueError, match="decay must be"):
        get_ema_multi_avg_fn(model, 1.0)

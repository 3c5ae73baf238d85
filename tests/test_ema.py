"""Weight averages that follow their connections, against averages kept by hand, position by
position.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn, optim

from rewire import topology
from rewire.ema import ExponentialMovingAverage
from rewire.nn import SparseLinear, SparseWeight

DECAY = 0.9


def make() -> nn.Sequential:
    return nn.Sequential(
        SparseLinear(6, 8, connections=20, capacity=24), nn.ReLU(), nn.Linear(8, 3)
    )


def rewire(weight: SparseWeight, slots: list[int], step: int, value: float = 0.5) -> None:
    none = torch.empty(0, dtype=torch.int64)
    drawn = topology.sample_dormant(
        weight.index, *weight.matrix_shape, len(slots), none, none, 5, step, 1
    )
    weight.rewire(torch.tensor(slots), *drawn, value)


def train(model: nn.Module, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 6)).pow(2).sum().backward()
    optimizer.step()


class ByHand:
    """Averages as dense tensors: {position: average} for connections, reset when one is grown."""

    def __init__(self, model: nn.Sequential) -> None:
        self.model = model
        self.was = self.there()
        self.dense = model[0].weight.to_dense().detach().clone()
        self.rest = [p.detach().clone() for p in (model[0].bias, *model[2].parameters())]

    def there(self) -> Tensor:
        rows, cols, _ = self.model[0].weight.coo()
        mask = torch.zeros(8, 6, dtype=torch.bool)
        mask[rows, cols] = True
        return mask

    def rewired(self) -> None:
        now, value = self.there(), self.model[0].weight.to_dense().detach()
        self.dense = torch.where(now, torch.where(self.was, self.dense, value), torch.zeros(()))
        self.was = now

    def update(self) -> None:
        value = self.model[0].weight.to_dense().detach()
        self.dense = torch.where(
            self.was, DECAY * self.dense + (1 - DECAY) * value, torch.zeros(())
        )
        own = (self.model[0].bias, *self.model[2].parameters())
        self.rest = [
            DECAY * a + (1 - DECAY) * p.detach() for a, p in zip(self.rest, own, strict=True)
        ]

    def check(self, average: ExponentialMovingAverage) -> None:
        with average.applied() as model:
            assert model is self.model
            torch.testing.assert_close(model[0].weight.to_dense(), self.dense)
            for a, p in zip(self.rest, (model[0].bias, *model[2].parameters()), strict=True):
                torch.testing.assert_close(p, a)
            assert not model[0].weight.values.detach()[model[0].weight.rows < 0].any()


def test_follows_rewiring_moving_and_resizing() -> None:
    model = make()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    average, expected = ExponentialMovingAverage(model, DECAY), ByHand(model)
    weight = model[0].weight
    changes = [
        lambda: None,
        lambda: rewire(weight, [3, 7, 22], 1),
        lambda: rewire(weight, [3], 2),
        lambda: weight.rewire(*torch.tensor([[5], [-1], [-1]])),
        lambda: weight.reorder(),
        lambda: weight.resize(30),
        lambda: rewire(weight, [28, 0], 3),
        lambda: weight.resize(weight.connections),
        lambda: weight.reorder(),
    ]
    for change in changes:
        train(model, optimizer)
        change()
        expected.rewired()
        expected.check(average)
        average.update()
        expected.update()
        expected.check(average)


def test_swapped_positions_start_afresh() -> None:
    model = make()
    weight = model[0].weight
    average = ExponentialMovingAverage(model, DECAY)
    slots = torch.tensor([0, 1])
    weight.rewire(
        slots, weight.rows[slots.flip(0)], weight.cols[slots.flip(0)], torch.tensor([5.0, 6.0])
    )
    assert average.state_dict()["average"]["0.weight.values"][:2].tolist() == [5, 6]


def test_applied_restores_even_after_an_error() -> None:
    model = make()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    average = ExponentialMovingAverage(model, DECAY)
    train(model, optimizer)
    average.update()
    own = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 6)
    with average.applied():
        assert not torch.equal(model[0].weight.values, own["0.weight.values"])
        inside = model(x)
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())

    def fail() -> None:
        with average.applied():
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())
    twin = copy.deepcopy(model)
    average.copy_to(twin)
    assert torch.equal(twin(x), inside)


def test_state_round_trip() -> None:
    model = make()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    average = ExponentialMovingAverage(model, DECAY)
    for step in range(3):
        train(model, optimizer)
        rewire(model[0].weight, [step], step)
        average.update()
    saved = copy.deepcopy((model.state_dict(), average.state_dict()))
    again = make()
    again[0].weight.resize(27)
    other = ExponentialMovingAverage(again, 0.5)
    with pytest.raises(ValueError, match="belong to another model"):
        other.load_state_dict(saved[1])
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert other.decay == DECAY
    # and what was saved is not touched by going on
    train(again, optim.SGD(again.parameters(), lr=0.1))
    other.update()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for a, m in ((average, model), (other, again)):
        rewire(m[0].weight, [9], 9)
        a.update()
    mine, theirs = average.state_dict()["average"], other.state_dict()["average"]
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_loading_the_model_starts_the_average_there() -> None:
    model, source = make(), make()
    source[0].weight.resize(30)
    average = ExponentialMovingAverage(model, DECAY)
    model.load_state_dict(source.state_dict())
    assert torch.equal(average.state_dict()["average"]["0.weight.values"], source[0].weight.values)
    average.update()


def test_bare_and_shared_pools_and_other_dtypes() -> None:
    weight = SparseWeight((6, 8), 20)
    average = ExponentialMovingAverage(weight, DECAY)
    rewire(weight, [3], 1)
    average.update()
    assert average.state_dict()["average"]["values"][3] == 0.5
    shared = nn.Sequential(
        SparseLinear.from_weight(weight), nn.ReLU(), SparseLinear.from_weight(weight)
    )
    both = ExponentialMovingAverage(shared, DECAY)
    shared.double()
    rewire(weight, [4], 2)
    both.update()
    assert both.state_dict()["average"]["0.weight.values"][4] == 0.5


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_decay_is_checked(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        ExponentialMovingAverage(make(), decay)


def test_detach_and_lifetime() -> None:
    model = make()
    average = ExponentialMovingAverage(model, DECAY)
    before = average.state_dict()["average"]["0.weight.values"]
    average.detach()
    rewire(model[0].weight, [0], 1)
    assert torch.equal(average.state_dict()["average"]["0.weight.values"], before)
    gone = weakref.ref(average)
    second = ExponentialMovingAverage(model, DECAY)
    watched = weakref.ref(second)
    del average, second
    gc.collect()
    assert gone() is None
    assert watched() is None
    rewire(model[0].weight, [0], 2)

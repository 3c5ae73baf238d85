"""Weight averages of models whose layers are cut, made sparse or exchanged, against averages kept
by hand.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import rewire
from rewire.ema import ExponentialMovingAverage
from rewire.nn.surgery import remove_units

X = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
DECAY = 0.8


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))


def train(
    model: nn.Module, optimizer: optim.Optimizer, average: Any, method: Any = None, steps: int = 4
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(X) - 1).square().mean()
        (loss if method is None else loss + method.penalty()).backward()
        optimizer.step()
        if method is not None:
            method.step()
        average.update()


def averaged(average: ExponentialMovingAverage) -> dict[str, Tensor]:
    found: dict[str, Tensor] = average.state_dict()["average"]
    return found


def applied(average: ExponentialMovingAverage) -> Tensor:
    with average.applied() as model, torch.no_grad():
        y: Tensor = model(X)
    return y


def test_units_that_are_removed_go_from_the_average() -> None:
    model = make()
    optimizer = optim.SGD(model.parameters(), 0.1)
    average = ExponentialMovingAverage(model, DECAY)
    train(model, optimizer, average)
    before = averaged(average)
    remove_units(model, {"0": [1, 5]}, X, optimizer)
    left = torch.tensor([i for i in range(16) if i not in (1, 5)])
    after = averaged(average)
    assert torch.equal(after["0.weight"], before["0.weight"][left])
    assert torch.equal(after["0.bias"], before["0.bias"][left])
    assert torch.equal(after["2.weight"], before["2.weight"][:, left])
    expected = {n: DECAY * after[n] + (1 - DECAY) * p for n, p in model.named_parameters()}
    average.update()
    for name, wanted in expected.items():
        torch.testing.assert_close(averaged(average)[name], wanted.detach())
    copied = copy.deepcopy(model)
    average.copy_to(copied)
    assert torch.equal(copied(X), applied(average))


@pytest.mark.parametrize("made", ["before", "after"])
def test_halo(made: str) -> None:
    model = make()
    optimizer = optim.Adam(model.parameters(), 0.01)
    early = ExponentialMovingAverage(model, DECAY)
    method = rewire.methods.create("halo", model, optimizer, density=0.3)
    average = early if made == "before" else ExponentialMovingAverage(model, DECAY)
    train(model, optimizer, average, method)
    before, masks = averaged(average), method.masks()
    method.finalize()
    for name, mask in masks.items():
        assert torch.equal(averaged(average)[f"{name}.values"], before[name][mask])
    train(model, optimizer, average)  # and on: pools are followed
    weight = model[0].weight
    free = (weight.to_dense() == 0).nonzero()[:1]
    weight.rewire(torch.tensor([2]), free[:, 0], free[:, 1], 0.25)
    weight.resize(weight.capacity + 3)
    assert averaged(average)["0.weight.values"][2] == 0.25
    assert averaged(average)["0.weight.values"].shape == weight.values.shape


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_ternary_averages_stay_what_they_were(kind: str, freeze: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = (
        make() if kind == "mlp" else nn.TransformerEncoderLayer(10, 2, 16, 0.0, batch_first=True)
    )
    inputs = X if kind == "mlp" else X.view(2, 3, 10)
    optimizer = optim.Adam(model.parameters(), 0.01)
    average = ExponentialMovingAverage(model, DECAY)
    method = rewire.methods.Ternary(model, optimizer, threshold=0.3, density=0.5, after_epochs=50)
    for _ in range(4):
        optimizer.zero_grad()
        ((model(inputs) - 1).square().mean() + method.penalty()).backward()
        optimizer.step()
        method.step()
        average.update()
    method.freeze()
    with average.applied(), torch.no_grad():
        expected = model(inputs)
    method.finalize()
    with average.applied(), torch.no_grad():
        torch.testing.assert_close(model(inputs), expected)
    sizes = averaged(average)["0.weight.values" if kind == "mlp" else "linear1.weight.values"].abs()
    assert torch.allclose(sizes, sizes[0].expand_as(sizes))


def test_noiseout_cuts_and_goes_back() -> None:
    model = make()
    optimizer = optim.Adam(model.parameters(), 0.01)
    average = ExponentialMovingAverage(model, DECAY)
    method = rewire.methods.NoiseOut(
        model, optimizer, data=[X], targets="none", required_score=0.0, at_once=2
    )
    scores = iter([1.0, -1.0])
    train(model, optimizer, average, method)
    method.end_epoch(lambda _: 1.0)
    assert averaged(average)["0.weight"].shape == model[0].weight.shape == (14, 10)
    train(model, optimizer, average, method)
    kept = model[0].weight.detach().clone()
    method.end_epoch(lambda _: next(scores))  # met before a merge, missed after it
    assert model[0].weight.shape == (13, 10)
    train(model, optimizer, average, method)
    method.finalize()
    assert torch.equal(model[0].weight, kept)
    for name, parameter in model.named_parameters():
        # begins anew with the network that is back
        assert torch.equal(averaged(average)[name], parameter), name
    train(model, optimizer, average)


@pytest.mark.parametrize(
    "settings", [{"units": "0"}, {"weights": "*"}, {"units": "0", "weights": "2"}], ids=str
)
def test_differentiable(settings: dict[str, str]) -> None:
    model = make()
    optimizer = optim.Adam(model.parameters(), 0.01)
    # the average is the model itself: easy to tell right from wrong
    average = ExponentialMovingAverage(model, 0.0)
    method = rewire.methods.Differentiable(model, optimizer, initial=0.9, strength=0.05, **settings)
    train(model, optimizer, average, method, 20)
    method.finalize()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(averaged(average)[name], parameter.detach())
    torch.testing.assert_close(applied(average), model(X).detach())
    train(model, optimizer, average)


def test_rewiring_within_applied_keeps_the_models_own_values_right() -> None:
    model = nn.Sequential(rewire.nn.SparseLinear(10, 8, density=0.4))
    average = ExponentialMovingAverage(model, DECAY)
    with torch.no_grad():
        model[0].weight.values.add_(1.0)
    own = model[0].weight.to_dense().detach().clone()
    with average.applied():
        model[0].weight.reorder()
        model[0].weight.resize(50)
    assert torch.equal(model[0].weight.to_dense(), own)


def test_what_nothing_announced_is_refused() -> None:
    model = make()
    average = ExponentialMovingAverage(model, DECAY)
    model[0] = rewire.nn.SparseLinear(10, 16, density=0.5)
    for use in (average.update, average.state_dict, lambda: average.applied().__enter__()):
        with pytest.raises(
            RuntimeError,
            match=r"were replaced .*0.weight.values.* make a new "
            r"average",
        ):
            use()
    model = make()
    average = ExponentialMovingAverage(model, DECAY)
    model[0].weight.data = torch.zeros(7, 10)
    with pytest.raises(RuntimeError, match=r"0.weight was of shape .*16, 10.* make a new average"):
        average.update()
    layer = nn.Linear(4, 3)
    average = ExponentialMovingAverage(layer, DECAY)
    rewire.to_sparse(layer, {"": torch.ones(3, 4, dtype=torch.bool)})
    with pytest.raises(RuntimeError, match="the model is one layer and was replaced as a whole"):
        average.update()


@pytest.mark.parametrize("decay", [1.0, -0.5, float("nan"), float("inf"), None, "0.9", True])
def test_files_are_checked(decay: Any) -> None:
    model = make()
    average = ExponentialMovingAverage(model, DECAY)
    good = average.state_dict()
    with pytest.raises(ValueError, match="decay must be"):
        average.load_state_dict({**good, "decay": decay})
    for bad, words in (
        ({}, "incomplete or damaged"),
        ({"decay": 0.5}, "incomplete or damaged"),
        ({"decay": 0.5, "average": 3}, "incomplete or damaged"),
        ({"decay": 0.5, "average": {**good["average"], "0.bias": 3}}, "'0.bias' is not a tensor"),
        (
            {
                "decay": 0.5,
                "average": {**good["average"], "0.bias": torch.ones(16, dtype=torch.int64)},
            },
            "is not a tensor",
        ),
        (
            {"decay": 0.5, "average": {**good["average"], "0.bias": torch.ones(15)}},
            "belong to another model",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            average.load_state_dict(bad)
    assert average.decay == DECAY
    other = nn.Sequential(rewire.nn.SparseLinear(10, 8, density=0.4))
    average = ExponentialMovingAverage(other, DECAY)
    elsewhere = nn.Sequential(rewire.nn.SparseLinear(10, 8, density=0.4))
    with pytest.raises(ValueError, match=r"0\.weight has other connections"):
        average.copy_to(elsewhere)
    with pytest.raises(ValueError, match="names or shapes"):
        average.copy_to(model)

"""Noise outputs: their targets and their loss, and what they do to the units before them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rewire.methods import NoiseOut
from rewire.methods.noiseout.noise_outputs import noise_targets

pytest.importorskip("torch_pruning")

from dependent_units import dependent


def toy(noise: str, outputs: int, seed: int) -> float:
    """|rho| of two linear hidden units after training on two Gaussian blobs (methods of the paper,
    section 3).
    """
    torch.manual_seed(seed)
    x = torch.cat([torch.randn(50, 2) - 1, torch.randn(50, 2) + 1])
    y = torch.cat([torch.zeros(50, 1), torch.ones(50, 1)])
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = NoiseOut(model, optimizer, data=[x], targets=noise, noise_outputs=outputs, seed=seed)  # type: ignore[arg-type]
    for _ in range(200):
        loss = nn.functional.mse_loss(model(x), y) + made.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        made.step()
    return float(torch.corrcoef(model[0](x).detach().T)[0, 1].abs())


def test_eight_noise_outputs_make_units_correlate_and_none_do_not() -> None:
    with_noise = [
        toy(noise, 8, seed) for noise, seed in [("constant", 0), ("gaussian", 1), ("binomial", 2)]
    ]
    assert min(with_noise) > 0.99
    assert np.mean([toy("none", 8, seed) for seed in range(3)]) < 0.9


@pytest.mark.parametrize(
    ("kind", "mean", "variance"),
    [("gaussian", 0.1, 0.16), ("binomial", 0.1, 0.09), ("constant", 0.1, 0)],
)
def test_noise_targets(kind: Any, mean: float, variance: float) -> None:
    y = noise_targets(kind, 5000, 8, 0.1, 0.4, seed=3, step=1, stream=1)
    assert y.shape == (5000, 8)
    assert float(y.mean()) == pytest.approx(mean, abs=5 * (variance / 40000) ** 0.5 + 1e-7)
    assert float(y.var()) == pytest.approx(variance, abs=0.01)
    again = noise_targets(kind, 5000, 8, 0.1, 0.4, seed=3, step=1, stream=1)
    other = noise_targets(kind, 5000, 8, 0.1, 0.4, seed=3, step=2, stream=1)
    assert torch.equal(y, again)
    assert kind == "constant" or not torch.equal(y, other)


def test_noise_outputs_leave_the_task_alone() -> None:
    """The penalty's gradient reaches what is before the head, not the head; the network's output
    does not change.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(9, 6)
    expected = model(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    groups = len(optimizer.param_groups)
    made = NoiseOut(model, optimizer, data=[x], seed=1, strength=2.0)
    assert torch.equal(model(x), expected)
    made.penalty()
    model(x)
    loss = made.penalty()
    assert float(made.penalty()) == 0  # nothing was computed since
    h = model[:2](x)
    assert made._outputs is not None
    y = noise_targets("gaussian", 9, 8, 0.1, 0.4, seed=1, step=1, stream=1 + 2**16 * 3)
    assert made._outputs._pairs[1][1].shape == y.shape
    by_hand = 2.0 * (made._outputs.layer(h) - made._outputs._pairs[1][1]).square().sum(1).mean()
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-6)
    loss.backward()
    assert model[2].weight.grad is None
    assert model[0].weight.grad is not None
    assert float(model[0].weight.grad.abs().max()) > 0
    before = made._outputs.layer.weight.detach().clone()
    optimizer.step()
    made.step()
    assert not torch.equal(before, made._outputs.layer.weight)
    assert isinstance(made._outputs.own, torch.optim.Adam)
    assert made._outputs.own.param_groups[0]["weight_decay"] == 0.1
    assert len(optimizer.param_groups) == groups


def test_noise_outputs_survive_merges() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()
    dependent(model[0], 1, 3, -2.0, 0.7)
    x = torch.randn(40, 6, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    made = NoiseOut(model, optimizer, data=[x], seed=1, required_score=-1.0, at_once=1)
    assert made._outputs is not None
    (model(x).sum() + made.penalty()).backward()
    optimizer.step()
    made.step()
    dependent(model[0], 1, 3, -2.0, 0.7)
    expected = made._outputs.layer(model[0](x))
    made.end_epoch(lambda m: 0.0)
    torch.testing.assert_close(made._outputs.layer(model[0](x)), expected, rtol=1e-9, atol=1e-9)
    for p in made._outputs.layer.parameters():
        assert made._outputs.own.state[p]["exp_avg"].shape == p.shape

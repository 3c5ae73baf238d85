"""What is special about soft-DEEP R: its law, its bounds, its start."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from harness import Run, linear
from rewire import methods, random, topology
from rewire.methods import SoftDeepR
from rewire.methods.core.base import Purpose
from rewire.nn import SparseWeight, sparse_weights
from rewire.schedules import Exponential


def chains(
    n: int, cols: int, eta: float, one_in: int = 3, **parameters: Any
) -> tuple[SparseWeight, torch.optim.Optimizer, SoftDeepR, torch.Tensor]:
    """One n x cols pool of float64, one in ``one_in`` of it active at 0.1, and the signs of its
    positions.
    """
    seed = parameters.setdefault("seed", 5)
    rows, columns = (
        t.flatten() for t in torch.meshgrid(torch.arange(n), torch.arange(cols), indexing="ij")
    )
    signs = topology.position_signs(rows, columns, seed, Purpose.COUNT + Purpose.SIGN).double()
    start = torch.arange(n * cols) % one_in == 0
    weight = SparseWeight.from_coo((n, cols), rows[start], columns[start], 0.1 * signs[start])
    model = nn.Sequential(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    return weight, optimizer, SoftDeepR(model, optimizer, **parameters), signs.view(n, cols)


@pytest.mark.parametrize(("p_min", "boundary"), [(0.1, "clip"), (0.4, "reflect")])
def test_a_share_p_min_is_active_where_the_loss_is_flat(boundary: Any, p_min: float) -> None:
    eta, one_in = (5e-4, 3) if p_min == 0.4 else (5e-3, 8)
    l1, temperature = 1.0, 0.2
    parameters = {"l1": l1, "temperature": temperature, "p_min": p_min, "boundary": boundary}
    weight, optimizer, method, _ = chains(100, 100, eta, one_in, **parameters)
    low = -temperature * (1 - p_min) / (l1 * p_min)
    seen = []
    for step in range(2_500):
        weight.values.grad = torch.zeros_like(weight.values)
        optimizer.step()
        method.step()
        assert float(method._dormant[0].min()) >= low - 1e-12
        if step >= 1_500 and step % 50 == 0:
            seen.append(weight.connections / weight.size)
    assert np.mean(seen) == pytest.approx(p_min, abs=0.01)


def test_patterns_follow_quadrature() -> None:
    """Two positions a chain, an energy that couples them, theta reflected at -1: the four patterns
    of activity.
    """
    temperature, alpha, low = 0.2, 0.1, -1.0
    mu, A = np.array([0.6, -0.4]), np.array([[1.2, 0.5], [0.5, 0.9]])
    s = np.array([1.0, -1.0])

    def density(b: float, a: float) -> float:
        theta = np.array([a, b])
        w = s * np.maximum(theta, 0.0)
        return math.exp(
            -(0.5 * (w - mu) @ A @ (w - mu) + alpha * np.maximum(theta, 0).sum()) / temperature
        )

    sides = ((low, 0.0), (0.0, 6.0))
    mass = np.array(
        [[integrate.dblquad(density, *x, *y, epsabs=1e-6)[0] for y in sides] for x in sides]
    )
    expected = mass / mass.sum()

    weight, optimizer, method, signs = chains(
        8_000, 2, 6e-3, l1=alpha, temperature=temperature, theta_min=low, boundary="reflect"
    )
    turn = signs * torch.tensor(s)
    for _ in range(2_500):
        rows, cols = weight.rows.long(), weight.cols.long()
        active = rows >= 0
        dense = torch.zeros(weight.shape, dtype=torch.float64)
        dense[rows[active], cols[active]] = weight.values.detach()[active]
        gradient = turn * ((turn * dense - torch.tensor(mu)) @ torch.tensor(A))
        weight.values.grad = torch.where(active, gradient[rows, cols], 0.0)
        optimizer.step()
        method.step()
    on = torch.zeros(weight.shape, dtype=torch.long)
    on[weight.coo()[0], weight.coo()[1]] = 1
    found = torch.bincount(2 * on[:, 0] + on[:, 1], minlength=4).numpy().reshape(2, 2) / len(on)
    assert 0.5 * np.abs(found - expected).sum() < 0.02


def test_update_rule_written_out() -> None:
    """Against a plain loop over all potential connections, for several steps."""
    eta, l1, noise, low = 0.25, 0.02, 0.3, -0.05
    weight, optimizer, method, signs = chains(6, 5, eta, l1=l1, noise=noise, theta_min=low, seed=9)
    theta = method._dormant[0].clone().view(6, 5)
    rows, cols, values = weight.coo()
    theta[rows, cols] = values.detach().abs()
    for step in range(1, 12):
        gradient = torch.randn(
            6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
        )
        r, c = weight.rows.long(), weight.cols.long()
        weight.values.grad = torch.where(r >= 0, gradient[r, c], 0.0)
        slot = {(int(a), int(b)): k for k, (a, b) in enumerate(zip(r, c, strict=True)) if a >= 0}
        on_slots = random.normal(9, step, method.pools[0].stream(Purpose.NOISE), weight.capacity)
        everywhere = random.normal(9, step, method.pools[0].stream(Purpose.GROW), 30)
        for i in range(6):
            for j in range(5):
                if (i, j) in slot:
                    theta[i, j] -= eta * signs[i, j] * gradient[i, j] + eta * l1
                    theta[i, j] += eta * noise * float(on_slots[slot[i, j]])
                else:
                    theta[i, j] += eta * noise * float(everywhere[5 * i + j])
                theta[i, j] = max(theta[i, j], low)
        optimizer.step()
        method.step()
        torch.testing.assert_close(
            weight.to_dense().detach(), signs * theta.clamp(min=0), atol=1e-6, rtol=0
        )
        dormant = theta < 0
        torch.testing.assert_close(
            method._dormant[0].view(6, 5)[dormant], theta[dormant], atol=1e-6, rtol=0
        )
    assert method.stats()["grown"]["0"] > 5


def test_the_pool_grows_and_shrinks_as_the_loss_asks() -> None:
    weight, optimizer, method, signs = chains(30, 20, 0.1, l1=0.01, noise=0.5, theta_min=-0.2)
    for push, steps in ((-1.0, 150), (1.0, 250)):
        for _ in range(steps):
            r, c = weight.rows.long(), weight.cols.long()
            weight.values.grad = torch.where(r >= 0, push * signs[r, c], 0.0)
            optimizer.step()
            method.step()
        assert weight.connections > 590 if push < 0 else weight.connections < 150
    assert weight.capacity > 200  # it began with as many


def test_authors_start_halves_the_network_at_the_first_step() -> None:
    model = nn.Sequential(
        SparseWeight((100, 100), 4_000, generator=torch.Generator().manual_seed(0))
    )
    weight = next(sparse_weights(model))[1]
    nn.init.normal_(weight.values, generator=torch.Generator().manual_seed(1))
    before = weight.to_dense().detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    method = SoftDeepR(model, optimizer, start="authors", noise=1e-4, l1=1e-4, seed=3)
    assert torch.equal(weight.to_dense(), before)
    for _ in range(2):
        weight.values.grad = torch.zeros_like(weight.values)
        optimizer.step()
        method.step()
        rows, cols, values = weight.coo()
        signs = topology.position_signs(rows, cols, 3, method.pools[0].stream(Purpose.SIGN))
        assert torch.equal(torch.copysign(torch.ones(()), values), signs.float())
    assert weight.connections == pytest.approx(2_000, abs=150)


def test_annealing_moves_theta_min_along() -> None:
    weight, optimizer, method, _ = chains(
        50, 50, 0.1, l1=0.1, temperature=Exponential(1e-2, 0.9), p_min=0.2
    )
    for step in range(1, 30):
        weight.values.grad = torch.zeros_like(weight.values)
        optimizer.step()
        method.step()
        low = -1e-2 * 0.9**step * 0.8 / (0.1 * 0.2)
        dormant = method._dormant[0]
        assert float(dormant.min()) == pytest.approx(low)
        assert float(dormant.max()) < 0


def test_tied_temperature_is_a_third_of_the_l1_step() -> None:
    finals = []
    for parameters in (
        {"temperature": "tied"},
        {"noise": 0.3 / 3},
        {"temperature": 0.25 * 0.3**2 / 18},
    ):
        run = Run(("soft-deep-r", {"l1": 0.3, "theta_min": -0.1} | parameters))
        run.optimizer.param_groups[0]["lr"] = 0.25
        for _ in range(3):
            run.step()
        finals.append(next(iter(run.weights().values())).to_dense())
    torch.testing.assert_close(finals[0], finals[1])
    torch.testing.assert_close(finals[0], finals[2])


def test_layers_have_their_own_numbers() -> None:
    run = Run(
        ("soft-deep-r", {"l1": [0.0, 1e-2], "theta_min": {"0": -0.1, "*": -0.2}, "noise": 0.1})
    )
    assert run.method.l1 == [0.0, 1e-2]
    for pool, low in zip(run.method.pools, (-0.1, -0.2), strict=True):
        assert run.method._lowest(pool, 0) == low
        assert float(run.method._dormant[pool.number].min()) == pytest.approx(low)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"p_min": 0.1, "theta_min": -1.0}, "not both"),
        ({"p_min": 0.0}, "p_min must be"),
        ({"p_min": 1.0}, "p_min must be"),
        ({"theta_min": 0.0}, "theta_min must be"),
        ({"theta_min": -math.inf}, "theta_min must be"),
        ({"l1": -1e-3}, "l1 must be a finite number at least 0"),
        ({"l1": 0.0}, "l1 of 0.weight is 0"),
        ({"l1": math.nan}, "l1 must be"),
        ({"noise": 0.0}, "because its temperature is"),
        ({"noise": -1.0}, "noise must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": "hot"}, "'tied'"),
        ({"noise": 1.0, "temperature": 1.0}, "not both"),
        ({"boundary": "bounce"}, "boundary must be one of"),
        ({"start": "none"}, "start must be one of"),
        ({"l1": [1e-3]}, "a list of 1 for 2 sparse weights"),
        ({"l1": {"0": 1e-3}}, "says nothing of 2.weight"),
        ({"l1": {"0": 1e-3, "2": 1e-3, "fc*": 1}}, "no sparse weight fits 'fc\\*'"),
        ({"p_min": {"*": 2.0}}, "p_min of 0.weight must be"),
    ],
)
def test_refusals(parameters: dict[str, Any], message: str) -> None:
    model = linear(torch.float32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        methods.create("soft-deep-r", model, optimizer, **parameters)


def test_weight_decay_is_refused() -> None:
    model = linear(torch.float32, 1)
    with pytest.raises(ValueError, match="weight decay"):
        SoftDeepR(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4))


def test_state_of_another_size_is_refused() -> None:
    run, other = Run(("soft-deep-r", {})), Run(("soft-deep-r", {}))
    state = other.method.state_dict()
    state["own"]["dormant"]["0.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match="192"):
        run.method.load_state_dict(state)

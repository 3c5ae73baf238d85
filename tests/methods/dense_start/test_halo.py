"""HALO: the penalty's shape, lambda's own descent, the cut, and that it goes on from where it
stopped.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from rewire import methods, schedules
from rewire.methods import Halo
from rewire.methods.dense_start.dense import largest
from rewire.methods.dense_start.halo import FLOOR, penalty_of
from rewire.nn import SparseConv1d, SparseLinear, SparseLSTM, sparse_weights

VARIANTS = ["halo", "squared", "sws", "l1"]


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6)).double()


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, method: methods.Method, time: int
) -> None:
    generator = torch.Generator().manual_seed(time)
    x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 6, (8,), generator=generator)
    optimizer.zero_grad()
    (nn.functional.cross_entropy(model(x), y) + method.penalty()).backward()
    optimizer.step()
    method.step()


@given(w=st.floats(1e-3, 10), xi=st.floats(1e-6, 1), psi=st.floats(1e-6, 1))
@settings(max_examples=60, deadline=None)
def test_at_its_minimum_over_lambda_the_penalty_is_the_cube_root_of_the_weight(
    w: float, xi: float, psi: float
) -> None:
    def at(log: float) -> float:
        first, second = penalty_of(
            "halo", [(torch.tensor([w]).double(), torch.tensor([log]).double().exp())], xi, psi
        )
        return float(first + second)

    found = minimize_scalar(at, bounds=(-15, 15), method="bounded", options={"xatol": 1e-10})
    assert found.fun == pytest.approx(
        3 / 2 ** (2 / 3) * (xi * psi**2) ** (1 / 3) * w ** (1 / 3), rel=1e-6
    )


def test_lambda_finds_that_minimum_by_its_own_descent() -> None:
    layer = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-2.0, 0.5, 0.01]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    method = Halo(layer, optimizer, xi=0.1, psi=0.05, lambda_lr=0.3, density=1.0, seed=0)
    start = layer.weight.detach().clone()
    for _ in range(3000):
        optimizer.zero_grad()
        method.penalty().backward()
        optimizer.step()
        with torch.no_grad():
            layer.weight.copy_(start)
        method.step()
    expected = (2 * 0.1 * start.abs() / 0.05) ** (1 / 3)
    torch.testing.assert_close(method.lambdas()["weight"], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shared", ["model", "weight"])
def test_a_run_is_joint_descent_by_autograd(variant: Any, shared: Any) -> None:
    """Beside a twin whose lambdas are parameters in an SGD of their own, as in the authors' code,
    over a schedule.
    """
    model, twin = mlp(), mlp()
    options = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-3}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    psi = 2e-5 if variant == "squared" else 2e-3
    method = Halo(
        model, optimizer, xi=1e-2, psi=psi, variant=variant, shared=shared, lambda_lr=1.0, seed=0
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1)

    weights = [twin[0].weight, twin[2].weight]
    lambdas: list[Any] = [nn.Parameter(torch.ones_like(w)) for w in weights]
    if variant == "sws":
        lambdas = [nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in weights]
        lambdas = lambdas if shared == "weight" else lambdas[:1] * 2
    if variant == "l1":
        lambdas = [torch.ones((), dtype=torch.float64)] * 2
    own = torch.optim.SGD(twin.parameters(), **options)
    trained = (
        list({id(a): a for a in lambdas}.values())
        if variant != "l1"
        else [nn.Parameter(torch.zeros(()))]
    )
    second = torch.optim.SGD(trained, **options)
    schedules_ = [torch.optim.lr_scheduler.StepLR(o, 4, 0.1) for o in (own, second)]
    for time in range(10):
        step(model, optimizer, method, time)
        schedule.step()
        generator = torch.Generator().manual_seed(time)
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 6, (8,), generator=generator)
        loss = nn.functional.cross_entropy(twin(x), y)
        loss = loss + 1e-2 * sum(
            (w.abs() / a**2).sum() for w, a in zip(weights, lambdas, strict=True)
        )
        size = torch.stack([a.abs().sum() for a in trained]).sum()
        squares = torch.stack([(a**2).sum() for a in trained]).sum()
        loss = (
            loss + psi * {"halo": size, "squared": size**2, "sws": squares, "l1": 0 * size}[variant]
        )
        for o in (own, second):
            o.zero_grad()
        loss.backward()
        for o, s in zip((own, second), schedules_, strict=True):
            o.step()
            s.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    found = method.lambdas()
    assert list(found) == ([] if variant == "l1" else ["0.weight", "2.weight"])
    for value, expected in zip(found.values(), lambdas, strict=False):
        torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)
        assert not torch.equal(value, torch.ones_like(value))


def test_lambda_stays_away_from_the_pole() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method = Halo(model, optimizer, xi=0.0, psi=0.4, lambda_lr=1.0, seed=0)
    for time in range(5):
        step(model, optimizer, method, time)
    for value in method.lambdas().values():
        assert torch.equal(value, torch.full_like(value, FLOOR))


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_the_cut_is_global_exact_and_gives_the_outputs_of_the_cut_dense_network(
    density: float,
) -> None:
    model = mlp().float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = Halo(model, optimizer, density=density, seed=0)
    x = torch.randn(20, 12)
    for _ in range(5):
        optimizer.zero_grad()
        (nn.functional.mse_loss(model(x), torch.ones(20, 6)) + method.penalty()).backward()
        optimizer.step()
        method.step()
    dense = copy.deepcopy(model)
    every = torch.cat([dense[0].weight.flatten(), dense[2].weight.flatten()]).abs()
    count = round(density * every.numel())
    least = every.sort(descending=True).values[count - 1]
    with torch.no_grad():
        for layer in (dense[0], dense[2]):
            layer.weight.mul_(layer.weight.abs() >= least)
    moments = optimizer.state[model[0].weight]["exp_avg"].clone()
    kept = dense[0].weight != 0

    assert method.count_connections() == {"0.weight": 192, "2.weight": 96}
    assert method.finalize() is model
    assert method.finalize() is model
    assert isinstance(model[0], SparseLinear)
    assert sum(w.connections for _, w in sparse_weights(model)) == count
    torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(optimizer.state[model[0].weight.values]["exp_avg"], moments[kept])
    before = model(x).detach()
    nn.functional.mse_loss(model(x), torch.ones(20, 6)).backward()
    optimizer.step()
    assert not torch.equal(before, model(x))
    torch.export.export(model.eval(), (x,))


def test_what_an_early_cut_leaves_trains_on_without_a_penalty_and_the_rest_stays_zero() -> None:
    """Momentum and weight decay go on moving what was cut, so it is set back in every step."""
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Unflatten(1, (1, 8)), Attention(8), nn.Flatten()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    method = Halo(model, optimizer, density=0.3, after_epochs=1, seed=0)
    x = torch.randn(20, 6)

    def train() -> None:
        optimizer.zero_grad()
        (nn.functional.mse_loss(model(x), torch.ones(20, 8)) + method.penalty()).backward()
        optimizer.step()
        method.step()

    for _ in range(3):
        train()
    assert float(method.penalty().detach()) > 0
    possible = sum(method.count_connections().values())
    masks = method.masks()
    method.end_epoch()
    assert float(method.penalty()) == 0
    values = {w.name: w.tensor.clone() for w in method.weights}
    for _ in range(3):
        train()
    method.end_epoch()
    for weight in method.weights:
        mask = masks[weight.name]
        assert torch.equal(mask, method.masks()[weight.name])
        assert not weight.tensor[~mask].any()
        assert (weight.tensor[mask] != values[weight.name][mask]).all()
    assert sum(method.count_connections().values()) == round(0.3 * possible)
    before = model(x)
    method.finalize()
    assert sum(w.connections for _, w in sparse_weights(model)) == round(0.3 * possible)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_scope_is_by_name_and_frozen_weights_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Unflatten(1, (2, 4)), nn.LSTM(4, 5)
    )
    model[2].weight.requires_grad_(False)

    def names(**scope: Any) -> list[str]:
        return [
            w.name
            for w in Halo(model, torch.optim.SGD(model.parameters(), lr=0.1), **scope).weights
        ]

    assert names() == ["0.weight", "4.weight_ih_l0", "4.weight_hh_l0"]
    assert names(only=["0", "*_hh_*"]) == ["0.weight", "4.weight_hh_l0"]
    assert names(exclude="4") == ["0.weight"]
    method = Halo(model, torch.optim.SGD(model.parameters(), lr=0.1), exclude="*_ih_*", density=0.1)
    method.finalize()
    assert isinstance(model[0], SparseConv1d)
    assert type(model[2]) is nn.Linear
    assert isinstance(model[4], SparseLSTM)
    counts = {n: w.connections for n, w in sparse_weights(model)}
    assert counts.pop("4.weight_ih_l0") == 80, "outside of the scope: complete"
    assert sum(counts.values()) == round(0.1 * (24 + 100))


class Attention(nn.Module):
    """Three of its four weights lie in one parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return x + y


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=40), st.floats(0.03, 1))
@settings(max_examples=60, deadline=None)
def test_largest_takes_the_largest_and_the_first_of_equals(
    numbers: list[int], density: float
) -> None:
    w = torch.tensor(numbers).float()
    if round(density * len(numbers)) < 1:
        return
    masks = largest({"a": w[: len(w) // 2], "b": w[len(w) // 2 :]}, density)
    kept = torch.cat([masks["a"], masks["b"]]).tolist()
    order = sorted(range(len(numbers)), key=lambda i: (-abs(numbers[i]), i))
    assert {i for i, k in enumerate(kept) if k} == set(order[: round(density * len(numbers))])


@pytest.mark.parametrize("cut", [None, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_bit_exact(variant: Any, cut: int | None) -> None:
    def begin(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Halo]:
        model = mlp(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        xi = schedules.Linear(1e-2, 0.0, 4)
        method = Halo(
            model,
            optimizer,
            xi=xi,
            psi=1e-2,
            variant=variant,
            lambda_lr=1.0,
            after_epochs=cut,
            seed=seed,
        )
        return model, optimizer, method

    def go(run: tuple[nn.Module, torch.optim.Optimizer, Halo], times: range) -> None:
        for time in times:
            step(*run, time)
            if time % 3 == 2:
                run[2].end_epoch()

    whole, first, second = begin(0), begin(0), begin(9)
    go(whole, range(9))
    go(first, range(4))
    saved = copy.deepcopy([part.state_dict() for part in first])
    for part, state in zip(reversed(second), reversed(saved), strict=True):
        part.load_state_dict(state)
    go(second, range(4, 9))
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    for n, value in whole[2].lambdas().items():
        assert torch.equal(value, second[2].lambdas()[n])
    other = Halo(second[0], second[1], variant="halo" if variant != "halo" else "l1", seed=0)
    with pytest.raises(ValueError, match="state of a method with variant"):
        other.load_state_dict(saved[2])
    with pytest.raises(ValueError, match="incomplete or damaged"):
        second[2].load_state_dict(saved[2] | {"own": {"lambda": []}})


def test_shared_weights_and_missing_penalties_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"0 shares its weight with 1\.weight"):
        Halo(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model = nn.Sequential(nn.Linear(5, 5))
    with pytest.raises(ValueError, match=r"0\.weight is in no optimizer"):
        Halo(model, torch.optim.SGD([model[0].bias], lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = Halo(model, optimizer)
    model(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"add method\.penalty"):
        method.step()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"xi": -1.0}, "xi must be"),
        ({"psi": float("nan")}, "psi must be"),
        ({"psi": schedules.Constant(-1)}, "psi must be"),
        ({"variant": "mcp"}, "variant must be one of 'halo'"),
        ({"shared": "layer"}, "shared must be"),
        ({"density": 0}, "density must be"),
        ({"density": 1.5}, "density must be"),
        ({"density": 1e-3}, "leaves a weight of 288 potential connections without any"),
        ({"after_epochs": 0}, "after_epochs must be"),
        ({"after_epochs": 1.5}, "after_epochs must be"),
        ({"lambda_start": 0.0}, "lambda_start must be"),
        ({"lambda_lr": -1.0}, "lambda_lr must be"),
        ({"lambda_momentum": 1.0}, "lambda_momentum must be"),
        ({"lambda_decay": -1.0}, "lambda_decay must be"),
        ({"only": 3}, "only must be a glob"),
        ({"only": "nothing*"}, "no dense weight to act on"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], message: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message):
        Halo(model, torch.optim.SGD(model.parameters(), lr=0.1), **given)


def test_loss_scaling_does_not_reach_lambda() -> None:
    results: list[dict[str, Tensor]] = []
    for scale in (1.0, 1024.0):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        method = Halo(model, optimizer, xi=0.01, psi=0.01, lambda_lr=1.0, seed=0)
        for _ in range(3):
            optimizer.zero_grad()
            ((model(torch.ones(1, 12).double()).sum() + method.penalty()) * scale).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad /= scale
            optimizer.step()
            method.step()
        results.append(method.lambdas())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name])

"""Methods that come down to their budget: what is special about each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import Run
from rewire import methods
from rewire.methods.pruning.shrink import final_budgets, lowest
from rewire.nn import SparseLinear, sparse_weights

SGD = torch.optim.SGD


def full(seed: int = 0, bias: bool = True) -> nn.Sequential:
    g = torch.Generator().manual_seed(seed)
    return nn.Sequential(
        SparseLinear(8, 10, bias, density=1.0, generator=g, dtype=torch.float64),
        nn.Tanh(),
        SparseLinear(10, 3, bias, density=1.0, generator=g, dtype=torch.float64),
    )


def batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=g, dtype=torch.float64), torch.randint(
        0, 3, (n,), generator=g
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, method: Any, *data: tuple[Tensor, Tensor]
) -> None:
    for x, y in data:
        loss = nn.functional.cross_entropy(model(x), y) + method.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.step()


def dense(model: nn.Module) -> list[Tensor]:
    return [w.to_dense().detach() for _, w in sparse_weights(model)]


# --- budgets and cuts -----------------------------------------------------------------------------


def budgets(**given: Any) -> list[int]:
    model = full()
    method = methods.Static(model, SGD(model.parameters(), 0.1))
    return final_budgets(
        method.pools, given.pop("connections", None), given.pop("density", None), **given
    )


def test_final_budgets_in_every_form() -> None:
    assert budgets(connections=55, distribution="uniform") == [40, 15]
    assert sum(budgets(connections=57)) == 57
    assert budgets(density=0.5, distribution="uniform") == [40, 15]
    assert budgets(connections=[7, 9]) == [7, 9]
    assert budgets(density=[0.1, 1.0]) == [8, 30]
    assert budgets(connections={"2*": 4, "*": 20}) == [20, 4]
    assert budgets(density={"0": 0.25, "2.weight": 0.5}) == [20, 15]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one"),
        ({"connections": 10, "density": 0.1}, "exactly one"),
        ({"connections": [7]}, "1 entries for 2"),
        ({"connections": [7, 31]}, "between 1 and 30"),
        ({"density": [0.5, 1.5]}, "at most 1"),
        ({"connections": 111}, "between 1 and 110"),
        ({"connections": {"0": 5}}, "nothing of 2.weight"),
        ({"connections": {"*": 5, "head": 5}}, "'head'"),
        ({"connections": 50, "distribution": "er_k"}, "er_k"),
    ],
)
def test_impossible_budgets_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budgets(**given)


def test_weakest_is_brute_force() -> None:
    g = torch.Generator().manual_seed(1)
    for trial in range(50):
        scores = [torch.randint(0, 4, (n,), generator=g).double() for n in (1, 7, 12)]
        keep = trial % 21
        gone = lowest(scores, keep, at_least=1)
        kept = [
            sorted(set(range(s.numel())) - set(d.tolist()))
            for s, d in zip(scores, gone, strict=True)
        ]
        assert sum(map(len, kept)) == max(keep, 3)
        # The best of each tensor, first of equals, is always there; of the rest the best are, first
        # of equals first.
        best = [int(s.argmax()) for s in scores]
        rest = [
            (-float(s[i]), t, i)
            for t, s in enumerate(scores)
            for i in range(s.numel())
            if i != best[t]
        ]
        want = sorted(rest)[: max(keep - 3, 0)]
        assert kept == [sorted([best[t]] + [i for _, u, i in want if u == t]) for t in range(3)]


@pytest.mark.parametrize("name", ["one-shot", "magnitude", "snip"])
def test_a_model_that_is_too_sparse_already_is_refused(name: str) -> None:
    model = full()
    optimizer = SGD(model.parameters(), 0.1)
    model[0].weight.rewire(torch.arange(70), torch.full((70,), -1), torch.full((70,), -1))
    with pytest.raises(ValueError, match=r"is to end with"):
        methods.create(name, model, optimizer, connections=[20, 30])
    with pytest.raises(ValueError, match="exactly one"):
        methods.create(name, model, optimizer)


# --- one-shot -------------------------------------------------------------------------------------


def test_one_shot_keeps_the_largest_and_their_momentum() -> None:
    model = full()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    method = methods.OneShot(model, optimizer, connections=[11, 5], after=2)
    train(model, optimizer, method, batch(16, 0))
    x, y = batch(16, 1)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = dense(model)
    momentum = [
        optimizer.state[w.values]["momentum_buffer"].clone() for _, w in sparse_weights(model)
    ]
    at = [(w.rows.long().clone(), w.cols.long().clone()) for _, w in sparse_weights(model)]
    method.step()
    for (_, w), old, v, (rows, cols), k in zip(
        sparse_weights(model), before, momentum, at, (11, 5), strict=True
    ):
        want = torch.zeros_like(old).flatten()
        top = old.flatten().abs().topk(k).indices
        want[top] = old.flatten()[top]
        assert torch.equal(w.to_dense(), want.view_as(old))
        assert w.capacity == w.connections == k == w.values.numel()
        where = torch.zeros_like(old)
        where[rows, cols] = v
        assert torch.equal(
            optimizer.state[w.values]["momentum_buffer"], where[w.rows.long(), w.cols.long()]
        )
    train(model, optimizer, method, *(batch(16, i) for i in range(5)))
    assert [w.connections for _, w in sparse_weights(model)] == [11, 5]


def test_one_shot_over_the_network_compares_layers() -> None:
    model = full()
    optimizer = SGD(model.parameters(), 0.1)
    with torch.no_grad():
        model[0].weight.values.mul_(100)
    method = methods.OneShot(model, optimizer, connections=50, after=1, scope="network")
    train(model, optimizer, method, batch(4))
    counts = [w.connections for _, w in sparse_weights(model)]
    assert sum(counts) == 50
    assert counts[1] <= 2  # its weights are small; but it is never emptied


def test_finalize_is_within_the_budget_whenever_training_ends() -> None:
    for name in ("one-shot", "magnitude", "snip"):
        model = full()
        optimizer = SGD(model.parameters(), 0.1)
        method = methods.create(name, model, optimizer, density=0.2)
        method.finalize()
        assert sum(w.connections for _, w in sparse_weights(model)) == 22, name
    run = Run(("one-shot", {"density": 0.1, "after": 50}))
    run.step()
    run.method.end_epoch(last=True)
    assert sum(w.connections for w in run.weights().values()) == round(0.1 * (12 * 16 + 16 * 6))


def test_slots_stay_under_ddp() -> None:
    model = full()
    for _, w in sparse_weights(model):
        w.shared_seed = 5  # what rewire.distributed.prepare sets
    optimizer = SGD(model.parameters(), 0.1)
    method = methods.OneShot(model, optimizer, connections=[11, 5], after=1)
    train(model, optimizer, method, *(batch(4, i) for i in range(3)))
    assert [(w.connections, w.capacity) for _, w in sparse_weights(model)] == [(11, 80), (5, 30)]


# --- Han et al. -----------------------------------------------------------------------------------


def test_magnitude_follows_an_exponential_schedule_to_the_budget() -> None:
    model = full()
    optimizer = SGD(model.parameters(), 0.1)
    method = methods.Magnitude(model, optimizer, connections=[10, 3], cycles=3, every_epochs=2)
    seen = []
    for epoch in range(8):
        train(model, optimizer, method, batch(8, epoch))
        values = [w.to_dense().detach().clone() for _, w in sparse_weights(model)]
        method.end_epoch()
        seen.append([w.connections for _, w in sparse_weights(model)])
        for (_, w), old in zip(sparse_weights(model), values, strict=True):
            kept = w.to_dense().detach()
            assert torch.equal(kept[kept != 0], old[kept != 0])
    exact = [[80 * (10 / 80) ** (i / 3), 30 * (3 / 30) ** (i / 3)] for i in range(4)]
    want = [[round(a), round(b)] for a, b in exact]
    assert seen == [[80, 30], want[1], want[1], want[2], want[2], [10, 3], [10, 3], [10, 3]]


def test_magnitude_by_quality_is_the_standard_deviation() -> None:
    model = full()
    optimizer = SGD(model.parameters(), 0.1)
    method = methods.Magnitude(model, optimizer, quality=0.7, cycles=2, every_epochs=1)
    train(model, optimizer, method, batch(8))
    want = []
    for w in dense(model):
        keep = w.abs() >= 0.7 * w.numpy().std()
        want.append(torch.where(keep, w, 0.0))
    method.end_epoch()
    assert all(torch.equal(a, b) for a, b in zip(dense(model), want, strict=True))
    with pytest.raises(ValueError, match="scope='layer'"):
        methods.Magnitude(model, optimizer, quality=0.7, scope="network")


def test_magnitude_by_quality_stops_at_a_budget() -> None:
    model = full()
    optimizer = SGD(model.parameters(), 0.1)
    method = methods.Magnitude(
        model, optimizer, quality=3.0, connections=[50, 9], cycles=2, every_epochs=1
    )
    train(model, optimizer, method, batch(8))
    method.end_epoch()
    assert [w.connections for _, w in sparse_weights(model)] == [50, 9]


# --- SNIP -----------------------------------------------------------------------------------------


def test_snip_is_brute_force_and_starts_from_the_initial_values() -> None:
    model = full()
    start = dense(model)
    twins = [w.clone().requires_grad_() for w in start]
    biases = [m.bias.detach().clone() for m in model if isinstance(m, SparseLinear)]
    x, y = batch(32)
    out = torch.tanh(x @ twins[0].T + biases[0]) @ twins[1].T + biases[1]
    nn.functional.cross_entropy(out, y).backward()
    saliency = [(w * w.grad).abs().detach() for w in twins]
    cut = torch.cat([s.flatten() for s in saliency]).sort(descending=True).values[24]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    method = methods.SNIP(model, optimizer, connections=25, batches=2)
    # two halves say what the whole says
    train(model, optimizer, method, (x[:16], y[:16]), (x[16:], y[16:]))
    for w, s, old, b, layer in zip(
        dense(model), saliency, start, biases, (model[0], model[2]), strict=True
    ):
        assert torch.equal(w, torch.where(s >= cut, old, 0.0))
        assert torch.equal(layer.bias, b)
    assert sum(int((w != 0).sum()) for w in dense(model)) == 25
    assert not optimizer.state[model[0].weight.values]
    train(model, optimizer, method, batch(8, 3))
    assert method.stats()["steps"] == 1
    assert float(optimizer.state[model[0].weight.values]["step"]) == 1


def test_snip_guards_every_layer() -> None:
    model = full()
    with torch.no_grad():
        model[0].weight.values.mul_(1e-9)
    optimizer = SGD(model.parameters(), 0.1)
    method = methods.SNIP(model, optimizer, connections=[12, 8], at_least=3)
    train(model, optimizer, method, batch(8))
    assert [w.connections for _, w in sparse_weights(model)] == [3, 17]
    with pytest.raises(ValueError, match="at_least"):
        methods.SNIP(full(), SGD(full().parameters(), 0.1), connections=[12, 8], at_least=0)
    with pytest.raises(ValueError, match="more than the budget"):
        methods.SNIP(model, optimizer, connections=[3, 2], at_least=3)


def test_snip_waits_for_every_optimizer() -> None:
    model = full(bias=False)
    optimizers = [SGD([model[0].weight.values], 0.1), SGD([model[2].weight.values], 0.1)]
    method = methods.SNIP(model, optimizers, connections=20)
    start = dense(model)
    x, y = batch(8)
    for optimizer in optimizers:
        nn.functional.cross_entropy(model(x), y).backward()
        assert [w.connections for _, w in sparse_weights(model)] == [80, 30]
        optimizer.step()
        method.step()
    assert sum(w.connections for _, w in sparse_weights(model)) == 20
    assert all(bool(((w == 0) | (w == s)).all()) for w, s in zip(dense(model), start, strict=True))


# --- L1 -------------------------------------------------------------------------------------------


def test_l1_finds_the_lasso() -> None:
    """With plain SGD on the whole data ISTA converges to the lasso: compared with
    scikit-learn's.
    """
    linear_model = pytest.importorskip("sklearn.linear_model")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 20, generator=g, dtype=torch.float64)
    y = x @ torch.cat(
        [torch.tensor([2.0, -3.0, 1.0]), torch.zeros(17)]
    ).double() + 0.1 * torch.randn(60, generator=g)
    model = SparseLinear(20, 1, bias=False, density=1.0, generator=g, dtype=torch.float64)
    optimizer = SGD(model.parameters(), 0.2)
    method = methods.L1(model, optimizer, l1=0.1)
    for _ in range(800):
        optimizer.zero_grad()
        (0.5 * (model(x).flatten() - y).square().mean()).backward()
        optimizer.step()
        method.step()
    want = (
        linear_model.Lasso(alpha=0.1, fit_intercept=False, tol=1e-10)
        .fit(x.numpy(), y.numpy())
        .coef_
    )
    assert model.weight.to_dense().detach().flatten().tolist() == pytest.approx(
        want.tolist(), abs=1e-6
    )
    nonzero = int((want != 0).sum())
    assert 3 <= nonzero < 20
    assert method.count_connections() == {"weight": nonzero}
    method.finalize()
    assert model.weight.connections == model.weight.capacity == nonzero


def test_l1_never_exceeds_a_budget_and_never_empties_a_layer() -> None:
    for l1, most in ((0.0, 6), (1e6, 1)):
        model = full()
        optimizer = SGD(model.parameters(), 0.1)
        method = methods.L1(model, optimizer, l1=l1, connections=[6, 6])
        train(model, optimizer, method, batch(8))
        method.finalize()
        assert [w.connections for _, w in sparse_weights(model)] == [most, most]


def test_l1_threshold_counts_and_cuts() -> None:
    model = full()
    optimizer = SGD(model.parameters(), 0.0)
    method = methods.L1(model, optimizer, zero=0.1)
    want = {
        f"{i}.weight": int((w.abs() > 0.1).sum()) for i, w in zip((0, 2), dense(model), strict=True)
    }
    assert method.count_connections() == want
    method.finalize()
    assert {name: w.connections for name, w in sparse_weights(model)} == want


BAD: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (methods.L1, {"l1": -1.0}, "l1"),
    (methods.L1, {"zero": -1.0}, "zero must be"),
    (methods.L1, {"every_epochs": 0}, "every_epochs must be"),
    (methods.OneShot, {"density": 0.1, "after": 0}, "at least 1"),
    (methods.OneShot, {"density": 0.1, "after": 3, "after_epochs": 1}, "not both"),
    (methods.OneShot, {"density": 0.1, "scope": "neuron"}, "one of 'layer', 'network'"),
    (methods.Magnitude, {"density": 0.1, "cycles": 0}, "cycles"),
    (methods.Magnitude, {"density": 0.1, "every_epochs": 1.5}, "every_epochs"),
    (methods.Magnitude, {"quality": -0.1}, "quality"),
    (methods.SNIP, {"density": 0.1, "batches": 0}, "batches"),
    (methods.SNIP, {"density": 0.1, "at_least": 81}, "at_least must be at most 80"),
]


@pytest.mark.parametrize(("make", "settings", "message"), BAD)
def test_bad_hyper_parameters_are_refused(
    make: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    model = full()
    with pytest.raises(ValueError, match=message):
        make(model, SGD(model.parameters(), 0.1), **settings)

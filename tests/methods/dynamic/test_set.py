"""SET's two-sided removal, and what a Rewirer of one's own composes to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness import Run, linear
from rewire import schedules
from rewire.methods import SET, Rewirer
from rewire.methods.core.base import Pool
from rewire.methods.criteria.drop import ByMagnitude, ByMagnitudeAndSign
from rewire.methods.criteria.grow import Grow, Random
from rewire.nn import SparseWeight


def pool_of(values: list[float]) -> Pool:
    n = len(values)
    weight = SparseWeight.from_coo(
        (n, 3), torch.arange(n).flip(0), torch.zeros(n).long(), torch.tensor(values)
    )
    optimizer = torch.optim.SGD([weight.values], lr=0.1)
    return Pool(0, "w", weight, optimizer, 0)


def test_the_same_share_of_each_sign_goes() -> None:
    pool = pool_of([0.5, -0.1, 0.2, 0.9, -0.7, 0.3, -0.3, 0.1, -0.2, -0.9])
    dropped = pool.weight.values[ByMagnitudeAndSign()(pool, 0.4)].tolist()
    assert sorted(round(v, 4) for v in dropped) == [-0.2, -0.1, 0.1, 0.2]


def test_zeros_count_as_the_smallest_positive() -> None:
    pool = pool_of([0.5, 0.0, 0.2, 0.0, -0.7])
    dropped = pool.weight.values[ByMagnitudeAndSign()(pool, 0.5)].tolist()
    assert dropped == [0.0, 0.0]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_counts_are_exact_with_ties(fraction: float) -> None:
    pool = pool_of([1.0] * 7 + [-1.0] * 4)
    chosen = ByMagnitudeAndSign()(pool, fraction)
    dropped = pool.weight.values[chosen]
    assert int((dropped > 0).sum()) == int(fraction * 7)
    assert int((dropped < 0).sum()) == int(fraction * 4)
    assert chosen.unique().numel() == chosen.numel()
    # Ties go by position: rows are in reverse slot order, so the last slots go first.
    positive = chosen[dropped > 0]
    assert torch.equal(positive.sort().values, torch.arange(7 - len(positive), 7))


def test_choice_does_not_depend_on_slots() -> None:
    torch.manual_seed(0)
    values = torch.randn(40)
    values[::3] = 0.25
    rows, cols = torch.arange(40) // 8, torch.arange(40) % 8
    order = torch.randperm(40)
    found = []
    for o in (torch.arange(40), order):
        weight = SparseWeight.from_coo((5, 9), rows[o], cols[o], values[o])
        optimizer = torch.optim.SGD([weight.values], lr=0.1)
        slots = ByMagnitudeAndSign()(Pool(0, "w", weight, optimizer, 0), 0.3)
        found.append(
            sorted(zip(weight.rows[slots].tolist(), weight.cols[slots].tolist(), strict=True))
        )
    assert found[0] == found[1]


def test_updates_once_an_epoch_but_not_after_the_last() -> None:
    run = Run(("set", {}))
    for epoch in range(3):
        for _ in range(run.steps_per_epoch - 1):
            run.step()
        before = {n: w.fingerprint() for n, w in run.weights().items()}
        run.backward()
        run.optimizer.step()
        run.method.step()
        run.time += 1
        assert {n: w.fingerprint() for n, w in run.weights().items()} == before
        run.method.end_epoch(last=epoch == 2)
        after = {n: w.fingerprint() for n, w in run.weights().items()}
        assert (after == before) == (epoch == 2)
    assert run.method.stats()["updates"] == 2


def test_new_values() -> None:
    for setting, zero in (("zero", True), ("normal", False)):
        run = Run(("set", {"new_values": setting, "every": 1}))
        weight = run.weights()["0.weight"]
        events: list[Any] = []
        weight.follow(events.append)
        run.step()
        new = weight.values.detach()[events[0].slots]
        assert (not new.any()) if zero else (new.abs() < 0.6).all() and new.unique().numel() > 1


def test_fraction_schedule_and_until() -> None:
    run = Run(("set", {"every": 1, "fraction": schedules.Linear(1.0, 0.0, 4), "until": 2}))
    counts = []
    for _ in range(4):
        before = run.method.stats()["dropped"]["0.weight"]
        run.step()
        counts.append(run.method.stats()["dropped"]["0.weight"] - before)
    assert counts[0] > counts[1] > 0
    assert counts[2:] == [0, 0]


def test_a_method_of_ones_own() -> None:
    model = linear(torch.float32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = Rewirer(
        model, optimizer, drop=ByMagnitude(), grow=Random(), fraction=0.25, every=2, seed=0
    )
    for _ in range(4):
        model(torch.randn(3, 12)).sum().backward()
        optimizer.step()
        method.step()
    assert method.stats()["updates"] == 2
    assert method.stats()["dropped"]["0.weight"] == 2 * int(0.25 * 40)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"fraction": 1.5}, "fraction must be a finite number between 0 and 1"),
        ({"fraction": -0.1}, "fraction must be"),
        ({"new_values": "ones"}, "one of 'zero', 'normal'"),
        ({"every": 0}, "every must be"),
        ({"until": -3}, "until must be"),
        ({"every": "week"}, "every must be"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    model = linear(torch.float32, 1)
    with pytest.raises(ValueError, match=message):
        SET(model, torch.optim.SGD(model.parameters(), lr=0.1), **parameters)


def test_a_grow_that_returns_too_few_is_refused() -> None:
    model = linear(torch.float32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class One(Grow):
        def __call__(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor([0]), torch.tensor([0])

    method = Rewirer(
        model, optimizer, drop=ByMagnitude(), grow=One(), fraction=0.25, every=1, seed=0
    )
    model(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"grow returned 1 rows .* 10 connections were dropped"):
        method.step()
    assert model[0].weight.connections == 40

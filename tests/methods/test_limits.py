"""Limits on fan-in, fan-out and blocks, kept at every step by every method that claims them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness import SETTINGS
from rewire import methods
from rewire.budget import Limits
from rewire.methods import Rewirer
from rewire.methods.criteria import drop, grow
from rewire.nn import SparseLinear, SparseWeight, sparse_weights

BASE = Limits(fan_in=6, fan_out=9, block=(4, 4, 7))
#: Methods that claim limits and take a model of pools: from the registry, so that a new one is
#: tested too.
CLAIMING = [
    n
    for n in methods.available()
    if methods.info(n).limits and not methods.info(n).cls.starts_dense
]
STRONG: dict[str, dict[str, Any]] = {
    "deep-r": {"l1": 0.01, "noise": 0.1},
    "set": {"every": 1, "fraction": 0.5},
    "rigl": {"every": 1, "fraction": 0.5, "candidates": None},
}


def within(weight: SparseWeight, limits: Limits) -> bool:
    dense = torch.zeros(weight.matrix_shape, dtype=torch.int64)
    rows, cols, _ = weight.coo()
    dense[rows, cols] = 1
    assert int(dense.sum()) == weight.connections
    ok = limits.fan_in is None or int(dense.sum(1).max()) <= limits.fan_in
    ok = ok and (limits.fan_out is None or int(dense.sum(0).max()) <= limits.fan_out)
    if limits.block:
        h, w, count = limits.block
        ok = ok and all(
            int(band.sum()) <= count for half in dense.split(h, 0) for band in half.split(w, 1)
        )
    return ok


def run(
    method: str, limits: Limits, k: tuple[int, int], steps: int, seed: int = 0, **options: Any
) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        SparseLinear(12, 16, connections=k[0], limits=limits, generator=g),
        nn.ReLU(),
        SparseLinear(16, 6, connections=k[1], limits=limits, generator=g),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    data = {"data": [torch.randn(20, 12, generator=g)]} if methods.info(method).takes_data else {}
    made = methods.create(method, model, optimizer, seed=seed, **data, **options)
    keeps = methods.info(method).keeps_budget == "every step"
    for step in range(steps):
        x, y = torch.randn(8, 12, generator=g), torch.randint(0, 6, (8,), generator=g)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + made.penalty()).backward()
        optimizer.step()
        made.step()
        if step % 4 == 3:
            made.end_epoch()
        for (_, weight), n in zip(sparse_weights(model), k, strict=True):
            assert within(weight, limits)
            assert not keeps or weight.connections == n
    assert not keeps or method == "static" or sum(made.stats()["grown"].values()) > 0
    return model


@pytest.mark.parametrize("name", CLAIMING)
def test_every_method_that_claims_limits_keeps_them(name: str) -> None:
    options = STRONG.get(name, SETTINGS.get(name, [{}])[0])
    run(name, BASE, (60, 30), 16, **options)


@given(
    st.sampled_from(["set", "deep-r", "rigl"]),
    st.none() | st.integers(1, 12),
    st.none() | st.integers(1, 16),
    st.none() | st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8)),
    st.floats(0.05, 1),
    st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_limits_hold_after_every_step(
    method: str,
    fan_in: int | None,
    fan_out: int | None,
    block: tuple[int, int, int] | None,
    share: float,
    seed: int,
) -> None:
    limits = Limits(fan_in, fan_out, block)
    most = limits.maximum(16, 12), limits.maximum(6, 16)
    k = max(1, int(share * most[0])), max(1, int(share * most[1]))
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        SparseLinear(12, 16, connections=k[0], limits=limits, generator=g),
        nn.ReLU(),
        SparseLinear(16, 6, connections=k[1], limits=limits, generator=g),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.5)
    made = methods.create(method, model, optimizer, seed=seed, **STRONG[method])
    for _ in range(12):
        x, y = torch.randn(8, 12, generator=g), torch.randint(0, 6, (8,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        made.step()
        for (_, weight), n in zip(sparse_weights(model), k, strict=True):
            assert weight.connections == n
            assert within(weight, limits)


def test_growth_by_gradient_takes_the_largest_that_fit() -> None:
    """RigL's exact choice under limits, against a loop over the dense gradient."""
    g = torch.Generator().manual_seed(0)
    limits = Limits(fan_in=4, fan_out=8)
    layer = SparseLinear(
        12, 8, False, connections=25, limits=limits, generator=g, dtype=torch.float64
    )
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    method = Rewirer(
        layer, optimizer, drop=drop.ByMagnitude(), grow=grow.ByGradient(None), fraction=0.3, every=1
    )
    x, y = (
        torch.randn(16, 12, generator=g, dtype=torch.float64),
        torch.randn(16, 8, generator=g, dtype=torch.float64),
    )
    dense = layer.weight.to_dense().detach().requires_grad_()
    (x @ dense.T - y).square().mean().backward()
    assert dense.grad is not None
    optimizer.zero_grad()
    (layer(x) - y).square().mean().backward()
    optimizer.step()
    rows, cols, values = layer.weight.coo()
    kept = torch.sort(values.detach().abs(), stable=True).indices[int(0.3 * 25) :]
    chosen = {(int(rows[i]), int(cols[i])) for i in kept}
    for key in torch.sort(
        dense.grad.abs().flatten(), descending=True, stable=True
    ).indices.tolist():
        r, c = divmod(key, 12)
        fits = sum(a == r for a, _ in chosen) < 4 and sum(b == c for _, b in chosen) < 8
        if (r, c) not in chosen and fits and len(chosen) < 25:
            chosen.add((r, c))
    method.step()
    rows, cols, _ = layer.weight.coo()
    assert set(zip(rows.tolist(), cols.tolist(), strict=True)) == chosen


def test_a_budget_that_moves_keeps_no_limits() -> None:
    model = SparseLinear(12, 16, connections=40, limits=BASE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for name in ("dsr", "mest"):
        with pytest.raises(
            ValueError, match="does not keep a limit on fan-in and fan-out and block"
        ):
            methods.create(name, model, optimizer, **SETTINGS.get(name, [{}])[0])


def test_what_a_method_does_not_keep_is_refused() -> None:
    def made(limits: Limits, **options: Any) -> object:
        model = SparseLinear(12, 16, connections=40, limits=limits)
        return methods.DeepR(model, torch.optim.SGD(model.parameters(), 0.1), **options)

    made(BASE)
    made(Limits(fan_in=6), scope="neuron")
    with pytest.raises(ValueError, match="does not keep a limit on fan-out and block"):
        made(BASE, scope="neuron")
    with pytest.raises(ValueError, match=r"fan-in 6.*does not keep a limit on fan-in"):
        made(Limits(fan_in=6), scope="network")


def test_a_composition_keeps_what_its_growth_keeps() -> None:
    model = SparseLinear(12, 16, connections=40, limits=BASE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Rewirer(model, optimizer, drop=drop.ByMagnitude(), grow=grow.Random(), fraction=0.2)

    class Blind(grow.Grow):
        def __call__(self, *arguments: Any) -> Any:
            return grow.Random()(*arguments)

    with pytest.raises(ValueError, match="does not keep a limit on fan-in and fan-out and block"):
        Rewirer(model, optimizer, drop=drop.ByMagnitude(), grow=Blind(), fraction=0.2)


def test_ranked_growth_takes_the_best_that_fit() -> None:
    model = SparseLinear(4, 4, connections=4, limits=Limits(fan_in=1))
    pool = methods.Static(model, torch.optim.SGD(model.parameters(), 0.1)).pools[0]
    dropped = pool.weight.active()[2:]  # rows 2 and 3
    assert pool.weight.rows[dropped].tolist() == [2, 3]
    ranked = torch.tensor([0, 2, 2, 3, 3]), torch.tensor([9, 1, 2, 3, 0]) % 4
    rows, cols = grow.fitting(pool, dropped, ranked, 2, 0, 1)
    assert (rows.tolist(), cols.tolist()) == ([2, 3], [1, 3])

"""RigL's choice against a brute-force dense computation; candidates; what it shares with every
gradient method.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dense_gradients import batches, dense_gradients, keys
from harness import LAYERS, Run
from rewire import methods
from rewire.methods import RigL
from rewire.methods.criteria import gradients
from rewire.nn import Candidates, SparseConv2d, SparseLinear, SparseWeight, sparse_weights
from rewire.topology import TopologyError


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("micro", [1, 3])
def test_choice_is_that_of_a_dense_computation(layer: str, micro: int) -> None:
    model = LAYERS[layer](torch.float64, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    method = RigL(model, optimizer, every=2, fraction=0.4, candidates=None, seed=1)
    for step in range(1, 5):
        data = batches(micro, step)
        optimizer.zero_grad()
        truth = dense_gradients(model, data)
        before = {n: (keys(w), w.coo()) for n, w in sparse_weights(model)}
        for x, y in data:
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        method.step()
        for name, weight in sparse_weights(model):
            active, (rows, cols, values) = before[name]
            if step % 2:
                assert keys(weight) == active
                continue
            n = int(0.4 * len(active))
            order = torch.sort(values.detach().abs(), stable=True).indices
            position = rows * weight.matrix_shape[1] + cols
            kept = set(position[order[n:]].tolist())
            score = truth[name].abs().flatten()
            free = torch.tensor(sorted(set(range(weight.size)) - kept))
            best = free[torch.sort(-score[free], stable=True).indices[:n]]
            mine = keys(weight) - kept
            assert len(keys(weight)) == len(active)
            # Equal up to positions whose gradients differ by rounding only.
            bar = score[best].min()
            assert all(score[k] >= bar * (1 - 1e-9) for k in mine)
            assert all(k in mine for k in best.tolist() if score[k] > bar * (1 + 1e-9))


@pytest.mark.parametrize("density", [0.005, 0.1])
def test_choice_in_a_layer_that_is_searched_with_a_sample(density: float) -> None:
    torch.manual_seed(0)
    layer = SparseLinear(1100, 1000, density=density, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    method = RigL(layer, optimizer, every=1, candidates=None, seed=1)
    weight = layer.weight
    before, values = weight.coo()[:2], weight.values.detach()[weight.active()]
    # rows of different scales
    x, g = torch.randn(16, 1100), torch.randn(16, 1000) * torch.rand(1000).exp()
    layer(x).backward(g)
    score = (g.double().t() @ x.double()).abs()
    optimizer.step()
    method.step()
    n = int(0.3 * weight.connections)
    active = torch.zeros(weight.matrix_shape, dtype=torch.bool)
    active[before] = True
    rows, cols = (t[values.abs().argsort(stable=True)[n:]] for t in before)
    kept = torch.zeros_like(active)
    kept[rows, cols] = True
    after = torch.zeros_like(active)
    after[weight.coo()[:2]] = True
    assert (after | ~kept).all()
    grown = after & ~kept
    assert int(grown.sum()) == n
    bar = score[~kept].topk(n).values[-1]
    assert score[grown].min() >= bar * (1 - 1e-5)
    assert (grown | kept)[score > bar * (1 + 1e-5)].all()


def test_a_step_that_updates_moves_nothing_unless_asked() -> None:
    for skip in (True, False):
        run = Run(("rigl", {"every": 2, "skip_step": skip}), optimizer="momentum")
        run.step()
        weight = run.weights()["0.weight"]
        before, bias = weight.values.detach().clone(), run.model[0].bias.detach().clone()
        buffer = run.optimizer.state[weight.values]["momentum_buffer"].clone()
        slots: list[Any] = []
        weight.follow(lambda event, slots=slots: slots.append(event.slots))
        run.step()
        stays = torch.ones_like(before, dtype=torch.bool)
        stays[slots[0]] = False
        assert torch.equal(weight.values.detach()[stays], before[stays]) == skip
        assert torch.equal(run.model[0].bias.detach(), bias) == skip
        assert (
            torch.equal(run.optimizer.state[weight.values]["momentum_buffer"][stays], buffer[stays])
            == skip
        )
        assert weight.values.grad is not None
        assert run.method.stats()["steps"] == 2


def test_regrown_connections_are_new_or_keep_value_and_momentum() -> None:
    found = {}
    for regrown in ("new", "keep"):
        run = Run(("rigl", {"every": 2, "regrown": regrown, "fraction": 1.0}), optimizer="momentum")
        run.step()
        weight = run.weights()["2.weight"]
        before = dict(zip(*position_values(weight), strict=True))
        run.step()
        after = dict(zip(*position_values(weight), strict=True))
        found[regrown] = after
        both = set(before) & set(after)
        assert both
        assert all(after[k] == (before[k] if regrown == "keep" else 0.0) for k in both)
        assert all(after[k] == 0.0 for k in set(after) - both)
    assert set(found["new"]) == set(found["keep"])


def position_values(weight: SparseWeight) -> tuple[list[int], list[float]]:
    rows, cols, values = weight.coo()
    return (rows * weight.matrix_shape[1] + cols).tolist(), values.tolist()


def test_the_fraction_follows_a_cosine_until_three_quarters() -> None:
    run = Run(("rigl", {"every": 2, "fraction": 0.5, "total_steps": 16}))
    counts = []
    for _ in range(8):
        before = run.method.stats()["dropped"]["0.weight"]
        run.step()
        run.step()
        counts.append(run.method.stats()["dropped"]["0.weight"] - before)
    assert counts == [
        int(0.25 * (1 + math.cos(math.pi * t / 12)) * 40) for t in (2, 4, 6, 8, 10, 12)
    ] + [0, 0]


# --- candidates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_candidates_have_the_dense_gradient_and_change_no_output(layer: str) -> None:
    model = LAYERS[layer](torch.float64, 5)
    data = batches(2, 9)
    truth = dense_gradients(model, data)
    plain = model(data[0][0])
    pools = [
        methods.Pool(i, name, weight, torch.optim.SGD([weight.values], lr=0.1), 0)
        for i, (name, weight) in enumerate(sparse_weights(model))
    ]
    for pool in pools:
        gradients.request(pool, 9, 3, 1)
    torch.testing.assert_close(model(data[0][0]), plain)
    for x, y in data:
        nn.functional.cross_entropy(model(x), y).backward()
    for pool in pools:
        name, weight, extra = pool.name, pool.weight, pool.weight.candidates
        assert pool.recorder is not None
        pool.recorder.freeze(1.0)
        assert extra is not None
        assert extra.count == min(9, weight.size - weight.connections)
        assert not keys(weight) & set((extra.rows * weight.matrix_shape[1] + extra.cols).tolist())
        own, new = gradients.probed(pool)
        torch.testing.assert_close(new, truth[name][extra.rows, extra.cols])
        torch.testing.assert_close(own, weight.values.grad)
        assert weight.values.grad.numel() == weight.capacity


def test_with_all_dormant_positions_as_candidates_the_choice_is_exact() -> None:
    found = []
    for candidates in (None, 10**6):
        run = Run(("rigl", {"every": 2, "candidates": candidates}), dtype=torch.float64)
        for _ in range(8):
            run.step()
        found.append([keys(w) for w in run.weights().values()])
    assert found[0] == found[1]


def test_more_to_grow_than_candidates_is_filled_at_random() -> None:
    weight = SparseWeight((20, 20), 100)
    pool = methods.Pool(0, "w", weight, torch.optim.SGD([weight.values], lr=0.1), 0)
    gradients.request(pool, 5, 1, 1)
    assert weight.candidates is not None
    values, _ = weight.operand()
    values.sum().backward()
    assert pool.recorder is not None
    pool.recorder.freeze(1.0)
    dropped = weight.active()[:10]
    rows, cols = gradients.best(pool, dropped, 60, 1, 1)
    found = set((rows * 20 + cols).tolist())
    assert len(found) == 60
    assert keys(weight, dropped) <= found
    assert set((weight.candidates.rows * 20 + weight.candidates.cols).tolist()) <= found
    assert not found & (keys(weight) - keys(weight, dropped))


def test_candidates_vanish_when_the_pool_changes_and_old_graphs_raise() -> None:
    layer = SparseLinear(6, 5, connections=8)
    weight = layer.weight
    pool = methods.Pool(0, "w", weight, torch.optim.SGD([weight.values], lr=0.1), 0)
    gradients.request(pool, 4, 1, 1)
    y = layer(torch.randn(3, 6))
    rows, cols, _ = weight.coo()
    weight.rewire(weight.active()[:1], rows[:1], cols[:1])
    assert weight.candidates is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(TopologyError):
        Candidates(weight, rows[:1], cols[:1])
    gradients.request(pool, 4, 1, 1)
    assert copy.deepcopy(layer).weight.candidates is None


def test_auto_is_exact_where_that_is_affordable() -> None:
    def of(rows: int, cols: int, k: int) -> int | None:
        weight = SparseWeight((rows, cols), k)
        return gradients.sampled(
            methods.Pool(0, "w", weight, torch.optim.SGD([weight.values], lr=0.1), 0), "auto"
        )

    assert of(1000, 1000, 10) is None
    assert of(10_000, 10_000, 10**6) is None
    assert of(10_000, 10_000, 10_000) == 10_000


@pytest.mark.parametrize("candidates", [0, -1, "all", 1.5, True])
def test_bad_candidates_are_refused(candidates: Any) -> None:
    with pytest.raises(
        ValueError, match="candidates must be a whole number of at least 1, or 'auto', or None"
    ):
        Run(("rigl", {"candidates": candidates}))


# --- compiled, narrow, accumulated ----------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, while tracing
        yield
    torch._dynamo.reset()


def small() -> nn.Sequential:
    g = torch.Generator().manual_seed(0)
    return nn.Sequential(
        SparseConv2d(2, 4, 3, padding=1, connections=20, generator=g),
        nn.ReLU(),
        nn.Flatten(),
        SparseLinear(64, 5, connections=60, generator=g),
    )


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("candidates", ["auto", 30])
def test_sampled_growth_in_a_compiled_model_is_that_of_an_eager_one(candidates: Any) -> None:
    found = []
    for compiled in (True, False):
        model = small()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = RigL(model, optimizer, every=2, candidates=candidates if compiled else 30, seed=4)
        for step in range(6):
            g = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            run(torch.randn(4, 2, 4, 4, generator=g)).square().sum().backward()
            optimizer.step()
            method.step()
        assert method.updates == 3
        assert all(w.traced == compiled for _, w in sparse_weights(model))
        found.append([w.fingerprint() for _, w in sparse_weights(model)])
        assert all(n > 0 for n in method.stats()["dropped"].values())
    if candidates == 30:
        assert found[0] == found[1]


@pytest.mark.usefixtures("fresh_dynamo")
def test_exact_growth_in_a_compiled_model_says_what_to_do() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = RigL(model, optimizer, every=1, candidates=None, seed=4)
    torch.compile(model, fullgraph=True, backend="aot_eager")(
        torch.randn(4, 2, 4, 4)
    ).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="candidates="):
        method.step()


@pytest.mark.parametrize("candidates", [None, 25])
def test_autocast_and_a_grad_scaler_change_no_choice_and_a_skipped_step_is_none(
    candidates: int | None,
) -> None:
    found = []
    for scale in (1.0, 2.0**10):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        method = RigL(model, optimizer, every=2, candidates=candidates, seed=4)
        step = 0
        while step < 4:
            for bad in [True, False] if step == 1 else [False]:
                optimizer.zero_grad()
                g = torch.Generator().manual_seed(step)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(torch.randn(4, 2, 4, 4, generator=g)).float().square().sum()
                if bad:
                    loss = loss * torch.inf
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update(scale)
                method.step()
                step += not bad
        assert method.steps == 4
        found.append([w.fingerprint() for _, w in sparse_weights(model)])
    assert found[0] == found[1]

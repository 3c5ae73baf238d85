"""What is special about SNFS, ITOP, MEST, DSR and SRigL, and budgets that move between layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dense_gradients import batches, dense_gradients, keys
from harness import LAYERS, Run
from rewire import methods, schedules, topology
from rewire.methods import DSR, MEST, SNFS, SRigL
from rewire.methods.criteria.share import spread
from rewire.methods.dynamic.margin import Margin
from rewire.nn import SparseLinear, SparseWeight, sparse_weights


def test_spread_gives_fractions_to_the_largest_remainders() -> None:
    assert spread(3, [0.5, 0.25, 0.25], [9, 9, 9]) == [1, 1, 1]
    assert spread(7, [5.0, 3.0, 2.0], [9, 9, 9]) == [4, 2, 1]  # 3.5, 2.1, 1.4
    # 6 do not fit; of the others' 8, 4.8 and 3.2
    assert spread(12, [5.0, 3.0, 2.0], [4, 9, 9]) == [4, 5, 3]


@given(
    total=st.integers(0, 60),
    shares=st.lists(
        st.floats(0, 1e6) | st.sampled_from([0.0, float("nan"), float("inf")]),
        min_size=1,
        max_size=6,
    ),
    data=st.data(),
)
def test_spread_is_exact_bounded_and_in_proportion(
    total: int, shares: list[float], data: st.DataObject
) -> None:
    room = data.draw(st.lists(st.integers(0, 60), min_size=len(shares), max_size=len(shares)))
    if total > sum(room):
        with pytest.raises(ValueError, match="do not fit"):
            spread(total, shares, room)
        return
    counts = spread(total, shares, room)
    assert sum(counts) == total
    assert all(0 <= c <= r for c, r in zip(counts, room, strict=True))
    good = all(s < float("inf") for s in shares) and sum(shares) > 0
    if good and all(total * s / sum(shares) <= r - 1 for s, r in zip(shares, room, strict=True)):
        assert all(
            abs(c - total * s / sum(shares)) < 1 for c, s in zip(counts, shares, strict=True)
        )


# --- SNFS -----------------------------------------------------------------------------------------


def test_exact_sparse_momentum_is_that_of_dense_gradients() -> None:
    model = LAYERS["conv"](torch.float64, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    method = SNFS(model, optimizer, exact=True, every=4, window=4, fraction=0.5, beta=0.8, seed=1)
    mean: dict[str, torch.Tensor] = {}
    for step in range(1, 5):
        data = batches(1, step)
        for name, g in dense_gradients(model, data).items():
            mean[name] = 0.8 * mean.get(name, torch.zeros_like(g)) + 0.2 * g
        before = {
            n: (keys(w), w.values.detach().abs(), w.active(), w.connections)
            for n, w in sparse_weights(model)
        }
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
        optimizer.step()
        values = {n: w.coo()[2].detach().abs() for n, w in sparse_weights(model)}
        shares = {n: mean[n][w.coo()[:2]].abs().mean().item() for n, w in sparse_weights(model)}
        method.step()
    for name in mean:
        torch.testing.assert_close(method.averaging.averages[name], mean[name])
    total = sum(int(0.5 * k) for *_, k in before.values())
    room = [w.size - before[n][3] + int(0.5 * before[n][3]) for n, w in sparse_weights(model)]
    counts = spread(total, list(shares.values()), room)
    for (name, weight), count in zip(sparse_weights(model), counts, strict=True):
        k = before[name][3]
        assert weight.connections == k - int(0.5 * k) + count
        order = torch.sort(values[name], stable=True).indices
        kept = {sorted(before[name][0])[i] for i in order[int(0.5 * k) :].tolist()}
        grown = keys(weight) - kept
        free = sorted(set(range(weight.size)) - kept)
        score = mean[name].abs().flatten()
        best = sorted(free, key=lambda i: -score[i].item())[:count]
        assert grown == set(best)


def test_candidates_stay_through_a_window_and_their_average_is_that_of_their_gradients() -> None:
    model = LAYERS["linear"](torch.float64, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    method = SNFS(model, optimizer, every=5, window=3, beta=0.5, candidates=20, seed=1)
    weight = dict(sparse_weights(model))["0.weight"]
    mean = torch.zeros(weight.matrix_shape, dtype=torch.float64)
    seen = []
    for step in range(1, 5):
        data = batches(1, step)
        if step >= 3:
            assert weight.candidates is not None
            seen.append(weight.candidates.rows * 12 + weight.candidates.cols)
            mean = 0.5 * mean + 0.5 * dense_gradients(model, data)["0.weight"]
        else:
            assert weight.candidates is None
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
        optimizer.step()
        method.step()
    assert torch.equal(seen[0], seen[1])
    average = method.averaging.averages["0.weight"]
    torch.testing.assert_close(average[weight.capacity :], mean.flatten()[seen[0]])
    torch.testing.assert_close(average[weight.active()], mean[weight.coo()[:2]])


def test_an_update_due_at_the_end_of_an_epoch_is_made_a_window_later() -> None:
    run = Run(("snfs", {"window": 3}))
    updates = []
    for _ in range(12):
        run.step()
        updates.append(run.method.updates)
    assert updates == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]  # epochs end after steps 4, 8 and 12


def test_a_window_longer_than_an_epoch_keeps_its_candidates() -> None:
    run = Run(("snfs", {"window": 6, "candidates": 6}))
    weight = run.weights()["0.weight"]
    run.step()
    seen, updates = [], []
    for _ in range(13):
        if weight.candidates is not None:
            seen.append((weight.candidates.rows * 12 + weight.candidates.cols).tolist())
        run.step()
        updates.append(run.method.updates)
    # The first epoch ends after step 4, the second one while its window is open, the third after
    # step 12.
    assert seen[:6] == [seen[0]] * 6
    assert updates == [0] * 8 + [1] * 5
    assert seen[6] == seen[7] != seen[0]


def test_a_state_of_sparse_momentum_stays_as_it_was_saved() -> None:
    run = Run(("snfs", {"exact": True, "every": 9}))  # the window, 10 steps, is for candidates
    run.step()
    saved = run.method.state_dict()["own"]["averages"]["0.weight"]
    before = saved.clone()
    run.step()
    assert torch.equal(saved, before)


# --- ITOP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_explored_counts_what_was_ever_active(grow: str) -> None:
    run = Run(("itop", {"every": 2, "growth": grow}))
    ever = {name: keys(w) for name, w in run.weights().items()}
    shares = []
    for _ in range(12):
        run.step()
        for name, weight in run.weights().items():
            ever[name] |= keys(weight)
        total = sum(w.size for w in run.weights().values())
        assert run.method.stats()["explored"] == sum(len(e) for e in ever.values()) / total
        shares.append(run.method.stats()["explored"])
    assert shares[-1] > shares[0]


def test_steps_without_an_update_do_not_look_at_all_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[str] = []
    plain = methods.Pool.keys
    monkeypatch.setattr(
        methods.Pool, "keys", lambda pool, slots: looked.append(pool.name) or plain(pool, slots)
    )
    run = Run(("itop", {"every": 100}))
    for _ in range(5):
        run.step()
    assert looked == ["0.weight", "2.weight"]


# --- MEST -----------------------------------------------------------------------------------------


def test_em_drops_by_magnitude_and_gradient_every_few_epochs() -> None:
    run = Run(("mest", {"every_epochs": 2, "gradient_weight": 3.0}))
    weight = run.weights()["0.weight"]
    for _ in range(7):
        run.step()
    assert run.method.updates == 0
    run.backward()
    run.optimizer.step()
    run.method.step()
    score = (weight.values.detach().abs() + 3 * weight.values.grad.abs())[weight.active()]
    order = torch.sort(score, stable=True).indices
    lowest = sorted(keys(weight))
    survivors = {lowest[i] for i in order[int(0.2 * 40) :].tolist()}
    run.method.end_epoch()
    assert run.method.updates == 1
    assert survivors <= keys(weight)
    assert weight.connections == 40


def test_the_gradient_in_its_score_is_that_of_the_last_step() -> None:
    for weight in (0.0, 1.0, 100.0):
        run = Run(("mest", {"every_epochs": 1, "gradient_weight": weight}))
        for _ in range(3):
            run.step()
        w = run.weights()["0.weight"]
        gradient, slots = w.values.grad.clone(), w.active()
        score = w.values.detach()[slots].abs() + weight * gradient[slots].abs()
        gone = set(slots[score.argsort(stable=True)[:8]].tolist())
        run.optimizer.zero_grad(set_to_none=weight > 1)
        before = w.rows.clone(), w.cols.clone()
        run.method.end_epoch()
        assert run.method.stats()["dropped"] == {"0.weight": 8, "2.weight": 6}
        changed = (w.rows != before[0]) | (w.cols != before[1])
        assert set(changed.nonzero().flatten().tolist()) <= gone
        assert changed.sum() > 4  # few come back at random


def test_the_soft_bound_is_kept_and_left_at_the_end() -> None:
    margin = schedules.Linear(0.5, 0.0, 3)
    run = Run(("mest", {"every_epochs": 1, "soft": True, "margin": margin}))
    weight, seen = run.weights()["0.weight"], []
    for _ in range(16):
        run.step()
        seen.append(weight.connections)
    assert seen[3::4] == [40 + int(margin(e) * 40) for e in (1, 2, 3, 4)]
    assert seen[-1] == 40
    other = Run(("mest", {"every_epochs": 1, "soft": True}))
    for _ in range(4):
        other.step()
    assert other.weights()["0.weight"].connections == 48
    other.method.finalize()
    assert other.weights()["0.weight"].connections == 40


def test_margins_are_the_authors() -> None:
    assert [Margin(0.2)(e) for e in (0, 89, 90, 119, 120, 200)] == [0.2, 0.2, 0.1, 0.1, 0.0, 0.0]


# --- DSR ------------------------------------------------------------------------------------------


def test_dsr_moves_budget_to_where_more_survives_and_adapts_its_threshold() -> None:
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        SparseLinear(20, 20, connections=100, generator=g),
        nn.ReLU(),
        SparseLinear(20, 6, connections=60, generator=g),
    )
    with torch.no_grad():
        model[2].weight.values.mul_(1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    method = DSR(model, optimizer, every=1, magnitude=1e-3, fraction=0.1, seed=3)
    below = [int((w.values.abs() < 1e-3).sum()) for _, w in sparse_weights(model)]
    assert below[1] == 60
    model(torch.randn(4, 20, generator=g)).square().sum().backward()
    optimizer.step()
    method.step()
    dropped = method.stats()["dropped"]
    assert dropped["2.weight"] == 59  # one stays
    left = [100 - dropped["0.weight"], 1]
    grown = spread(sum(dropped.values()), left, [400, 120])
    assert list(method.stats()["grown"].values()) == grown
    assert sum(w.connections for _, w in sparse_weights(model)) == 160
    assert method.threshold.magnitude == 5e-4  # too many went
    for _ in range(3):
        model(torch.randn(4, 20, generator=g)).square().sum().backward()
        optimizer.step()
        method.step()
    assert method.threshold.magnitude != 5e-4


# --- SRigL ----------------------------------------------------------------------------------------


def live_fan_in(weight: SparseWeight) -> set[int]:
    return set(weight.fan_in().tolist()) - {0}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9])
def test_fan_in_is_constant_at_every_moment(layer: str, gamma: float) -> None:
    run = Run(("srigl", {"every": 1, "fraction": 0.5, "gamma": gamma}), layer, "momentum")
    for _ in range(20):
        assert all(len(live_fan_in(w)) == 1 for w in run.weights().values())
        run.step()
        for handle in run.weights().values():
            assert len(live_fan_in(handle)) == 1
    assert run.method.updates == 20
    assert sum(run.method.stats()["grown"].values()) > 0


def test_what_rounding_leaves_unused_is_given_back_at_the_end() -> None:
    layer = SparseLinear(30, 8, connections=45, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(layer.parameters())
    method = SRigL(layer, optimizer, every=1, seed=1)
    layer(torch.randn(4, 30)).square().sum().backward()
    optimizer.step()
    method.step()
    assert layer.weight.capacity == 45 > layer.weight.connections
    dense = layer.weight.to_dense()
    assert method.finalize() is layer
    assert layer.weight.capacity == layer.weight.connections == layer.weight.values.numel()
    assert torch.equal(layer.weight.to_dense(), dense)
    assert optimizer.state[layer.weight.values]["exp_avg"].shape == layer.weight.values.shape
    roomy = SparseLinear(30, 8, connections=45, capacity=60)
    method = SRigL(roomy, torch.optim.SGD(roomy.parameters(), lr=0.1))
    method.finalize()
    assert roomy.weight.capacity == 60 - (45 - roomy.weight.connections)  # what was asked for stays


def test_neurons_without_salient_weights_are_ablated_and_their_budget_goes_to_the_others() -> None:
    g = torch.Generator().manual_seed(0)
    layer = SparseLinear(30, 8, connections=40, generator=g, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-12)
    method = SRigL(layer, optimizer, every=1, fraction=0.25, gamma=0.5, seed=1)
    assert live_fan_in(layer.weight) == {5}
    rows = layer.weight.rows.long()
    # the weights of rows 2 and 5 are the 10 smallest; no gradient asks for them
    with torch.no_grad():
        layer.weight.values.copy_(torch.where((rows == 2) | (rows == 5), 1e-6, 1.0))
    y = layer(torch.randn(16, 30, generator=g))
    factor = torch.ones(8)
    factor[[2, 5]] = 0.0
    (y * factor).square().sum().backward()
    optimizer.step()
    method.step()
    fan_in = layer.weight.fan_in()
    assert fan_in[[2, 5]].tolist() == [0, 0]
    assert live_fan_in(layer.weight) == {40 // 6}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("candidates", [1, 20])
def test_fan_in_is_constant_with_candidates_too(layer: str, candidates: int) -> None:
    run = Run(("srigl", {"every": 1, "fraction": 0.5, "candidates": candidates}), layer, "adam")
    for _ in range(10):
        run.step()
        for handle in run.weights().values():
            assert len(live_fan_in(handle)) == 1
    assert run.method.updates == 10


@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_all_positions_as_candidates_are_the_exact_choice(gamma: float) -> None:
    """Candidates go another way (autograd through a larger pool) than the captured step: both
    choose the same.
    """

    def train(candidates: int | None) -> tuple[SparseLinear, SRigL]:
        g = torch.Generator().manual_seed(3)
        layer = SparseLinear(30, 12, connections=90, generator=g, dtype=torch.float64)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
        method = SRigL(
            layer, optimizer, every=2, fraction=0.4, gamma=gamma, candidates=candidates, seed=1
        )
        for _ in range(20):
            optimizer.zero_grad()
            layer(torch.randn(16, 30, generator=g, dtype=torch.float64)).pow(2).sub(
                1
            ).square().mean().backward()
            optimizer.step()
            method.step()
        return layer, method

    (exact, one), (sampled, other) = train(None), train(30 * 12)
    assert one.updates == other.updates == 10
    assert one.stats()["grown"]["weight"] > 50
    assert topology.fingerprint(exact.weight.rows, exact.weight.cols) == topology.fingerprint(
        sampled.weight.rows, sampled.weight.cols
    )
    torch.testing.assert_close(
        exact.weight.to_dense(), sampled.weight.to_dense(), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({}, 10),
        ({"every": 3}, 3),
        ({"every": 30}, 10),
        ({"every": 30, "window": 20}, 20),
        ({"window": 4}, 4),
    ],
)
def test_the_window_fits_between_updates_by_itself(options: dict[str, int], window: int) -> None:
    model = LAYERS["linear"](torch.float32, 1)
    assert SNFS(model, torch.optim.SGD(model.parameters(), lr=0.1), **options).window == window


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, o: SNFS(m, o, beta=1.5), "beta must be"),
        (lambda m, o: SNFS(m, o, every=3, window=5), "at least 1 and at most every=3, not 5"),
        (lambda m, o: SNFS(m, o, window=0), "window must be"),
        (lambda m, o: SNFS(m, o, every="epoch"), "every must be"),
        (lambda m, o: SNFS(m, o, every=0), "every must be"),
        (lambda m, o: SNFS(m, o, candidates=None), "candidates must be"),
        (lambda m, o: MEST(m, o, milestones=(3,)), "milestones must be"),
        (lambda m, o: MEST(m, o, milestones=5), "milestones must be"),
        (lambda m, o: methods.RigL(m, o, until=-5), "until must be"),
        (lambda m, o: MEST(m, o, margin=-0.1), "margin must be"),
        (lambda m, o: MEST(m, o, every_epochs=0), "every_epochs must be"),
        (lambda m, o: DSR(m, o, magnitude=0.0), "magnitude must be"),
        (lambda m, o: DSR(m, o, tolerance=-1), "tolerance must be"),
        (lambda m, o: SRigL(m, o, gamma=2.0), "gamma must be"),
        (lambda m, o: SRigL(m, o, candidates=0), "candidates must be"),
        (lambda m, o: methods.RigL(m, o, total_steps=0), "total_steps must be"),
        (lambda m, o: methods.RigL(m, o, regrown="old"), "regrown must be"),
        (lambda m, o: methods.ITOP(m, o, growth="all"), "growth must be"),
    ],
)
def test_bad_parameters_are_refused(make: Any, message: str) -> None:
    model = LAYERS["linear"](torch.float32, 1)
    with pytest.raises(ValueError, match=message):
        make(model, torch.optim.SGD(model.parameters(), lr=0.1))

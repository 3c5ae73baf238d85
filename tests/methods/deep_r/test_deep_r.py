"""What is special about DEEP R: the update rule, signs, scopes, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from harness import Run, linear
from rewire import topology
from rewire.methods import DeepR
from rewire.methods.core.base import Purpose
from rewire.methods.criteria.grow import allot
from rewire.nn import SparseLinear, SparseWeight, sparse_weights


def make(**parameters: Any) -> tuple[nn.Module, torch.optim.Optimizer, DeepR]:
    model = linear(torch.float64, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    return model, optimizer, DeepR(model, optimizer, **({"seed": 1} | parameters))


def test_update_rule_written_out() -> None:
    """Against a plain loop over connections: gradient, then L1 and noise on theta, then the sign
    test.
    """
    model, optimizer, method = make(l1=0.01, noise=0.3)
    weight = dict(sparse_weights(model))["0.weight"]
    old = weight.values.detach().clone()
    rows, cols = weight.rows.clone(), weight.cols.clone()
    signs = torch.sign(old)
    gradient = torch.randn(
        weight.capacity, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for pool in method.pools:
        pool.weight.values.grad = torch.zeros_like(pool.weight.values)
    weight.values.grad = gradient.clone()
    optimizer.step()
    method.step()
    from rewire.random import normal

    nu = normal(1, 1, method.pools[0].stream(Purpose.NOISE), weight.capacity).double()
    theta = signs * (old - 0.25 * gradient) - 0.25 * 0.01 + 0.25 * 0.3 * nu
    stay = theta >= 0
    assert 0 < int(stay.sum()) < weight.capacity
    torch.testing.assert_close(
        weight.values.detach()[stay], (signs * theta)[stay], atol=1e-6, rtol=0
    )
    assert torch.equal(weight.rows[stay], rows[stay])
    assert torch.equal(weight.cols[stay], cols[stay])
    assert not weight.values.detach()[~stay].any()


def test_temperature_and_noise_are_the_same_thing() -> None:
    eta, noise = 0.25, 0.2
    finals = []
    for parameters in ({"noise": noise}, {"temperature": eta * noise**2 / 2}):
        model, optimizer, method = make(**parameters)
        for pool in method.pools:
            pool.weight.values.grad = torch.zeros_like(pool.weight.values)
        optimizer.step()
        method.step()
        finals.append(next(sparse_weights(model))[1].to_dense())
    torch.testing.assert_close(finals[0], finals[1])


def test_learning_rate_is_the_one_the_step_used() -> None:
    """A scheduler called before method.step() must not change the L1 of the step just made."""
    model, optimizer, method = make(l1=1.0, noise=0.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    weight = next(sparse_weights(model))[1]
    with torch.no_grad():
        weight.values.copy_(10 * torch.sign(weight.values))
    for pool in method.pools:
        pool.weight.values.grad = torch.zeros_like(pool.weight.values)
    optimizer.step()
    scheduler.step()
    method.step()
    torch.testing.assert_close(
        weight.values.detach().abs(), torch.full_like(weight.values, 10 - 0.25)
    )


def test_learning_rate_is_followed_after_the_optimizer_was_loaded() -> None:
    """optimizer.load_state_dict puts new group dicts in place of those the method found at
    construction.
    """
    model, optimizer, method = make(l1=1.0, noise=0.0)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.125
    weight = next(sparse_weights(model))[1]
    with torch.no_grad():
        weight.values.copy_(10 * torch.sign(weight.values))
    for pool in method.pools:
        pool.weight.values.grad = torch.zeros_like(pool.weight.values)
    optimizer.step()
    method.step()
    torch.testing.assert_close(
        weight.values.detach().abs(), torch.full_like(weight.values, 10 - 0.125)
    )


def test_fixed_signs_belong_to_positions() -> None:
    """Through hundreds of rewirings a connection keeps its sign while it lives, and grows with its
    position's.
    """
    run = Run(("deep-r", {"l1": 1e-3, "noise": 0.05}))
    for _ in range(60):
        before = {n: w.to_dense().detach().clone() for n, w in run.weights().items()}
        grown: dict[str, list[Any]] = {n: [] for n in before}
        handles = [w.follow(grown[n].append) for n, w in run.weights().items()]
        run.step()
        for handle in handles:
            handle.remove()
        for pool in run.method.pools:
            weight, new = pool.weight, torch.zeros(pool.weight.capacity, dtype=torch.bool)
            for event in grown[pool.name]:
                new[event.slots] = True
            signs = torch.copysign(torch.ones(()), weight.values.detach())
            positions = topology.position_signs(
                weight.rows, weight.cols, run.method.seed, pool.stream(Purpose.SIGN)
            )
            assert torch.equal(signs[new], positions[new].float())
            old = before[pool.name][weight.rows.long(), weight.cols.long()]
            stayed = ~new & (old != 0)
            assert torch.equal(signs[stayed], torch.sign(old[stayed]))
    assert sum(run.method.stats()["dropped"].values()) > 100


@pytest.mark.parametrize("signs", ["fixed", "redrawn"])
def test_a_trained_network_is_not_changed_by_making_the_method(signs: Any) -> None:
    model = linear(torch.float32, 5)
    before = {n: w.to_dense().detach().clone() for n, w in sparse_weights(model)}
    DeepR(model, torch.optim.SGD(model.parameters(), lr=0.5), signs=signs, seed=0)
    for name, weight in sparse_weights(model):
        assert torch.equal(weight.to_dense(), before[name])


def test_redrawn_signs_change() -> None:
    run = Run(("deep-r", {"l1": 1e-3, "noise": 0.05, "signs": "redrawn"}))
    seen: dict[tuple[str, int, int], set[float]] = {}
    for _ in range(60):
        run.step()
        for name, weight in run.weights().items():
            for r, c, v in zip(*(t.tolist() for t in weight.coo()), strict=True):
                if v:
                    seen.setdefault((name, r, c), set()).add(math.copysign(1, v))
    assert any(len(signs) == 2 for signs in seen.values())


def test_network_scope_moves_budget_between_layers() -> None:
    run = Run(("deep-r", {"l1": 1e-2, "noise": 0.2, "scope": "network"}))
    start = {n: w.connections for n, w in run.weights().items()}
    for _ in range(40):
        run.step()
    end = {n: w.connections for n, w in run.weights().items()}
    assert sum(start.values()) == sum(end.values())
    assert start != end


@pytest.mark.parametrize("shares", [None, [40.0, 30.0]], ids=["uniform", "authors"])
def test_allotment_has_the_law_it_claims(shares: list[float] | None) -> None:
    """Mean share of each layer over many draws: by dormant connections, or by initial budgets."""
    _, _, method = make()
    pools = method.pools
    dropped = [torch.arange(6), torch.arange(4)]
    counts = torch.tensor([allot(pools, dropped, shares, 1, step) for step in range(3000)]).double()
    assert (counts.sum(1) == 10).all()
    room = torch.tensor([12 * 16 - 40 + 6, 16 * 6 - 30 + 4]).double()
    expected = 10 * (
        room / room.sum() if shares is None else torch.tensor(shares).double() / sum(shares)
    )
    assert torch.allclose(counts.mean(0), expected, atol=0.12)


def test_allotment_never_exceeds_the_room() -> None:
    model = nn.Sequential(SparseLinear(3, 3, connections=8), SparseLinear(3, 30, connections=20))
    method = DeepR(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        scope="network",
        allotment="authors",
        seed=0,
    )
    for step in range(50):
        first, second = allot(
            method.pools, [torch.arange(0), torch.arange(20)], [1000.0, 1.0], 3, step
        )
        assert first <= 1
        assert first + second == 20


def test_full_layer_keeps_its_connections() -> None:
    """With nothing dormant there, what is dropped comes back at the same place."""
    model = nn.Sequential(SparseLinear(4, 3, density=1.0), SparseLinear(3, 2, connections=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method = DeepR(model, optimizer, l1=10.0, seed=0)
    for _ in range(5):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        method.step()
        assert model[0].weight.connections == 12
    assert method.stats()["dropped"]["0.weight"] > 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"l1": -1.0}, "l1 must be a finite number at least 0"),
        ({"l1": math.nan}, "l1 must be"),
        ({"noise": math.inf}, "noise must be"),
        ({"temperature": -1e-9}, "temperature must be"),
        ({"noise": 0.1, "temperature": 0.1}, "not both"),
        ({"scope": "planet"}, "'layer', 'network', 'neuron'"),
        ({"signs": "none"}, "'fixed', 'redrawn'"),
        ({"allotment": "x"}, "'uniform', 'authors'"),
        ({"every": 0}, "at least 1"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_parameters_are_refused_at_construction(
    parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**parameters)


def test_weight_decay_is_refused() -> None:
    model = linear(torch.float32, 5)
    with pytest.raises(ValueError, match="weight decay"):
        DeepR(model, torch.optim.AdamW(model.parameters()))
    groups = [
        {"params": [w.values for _, w in sparse_weights(model)], "weight_decay": 0.0},
        {"params": [model[0].bias], "weight_decay": 0.1},
    ]
    DeepR(model, torch.optim.AdamW(groups))


def test_pools_must_be_in_the_optimizer_exactly_once() -> None:
    dense = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    from rewire import sparsify

    sparsify(dense, density=0.5)
    with pytest.raises(ValueError, match="make the optimizer after"):
        DeepR(dense, optimizer)
    with pytest.raises(ValueError, match="no sparse weights"):
        DeepR(nn.Linear(3, 3), optimizer)


def test_several_optimizers_step_their_own_pools() -> None:
    model = linear(torch.float32, 5)
    first = torch.optim.SGD(model[0].parameters(), lr=0.5)
    second = torch.optim.SGD(model[2].parameters(), lr=0.5)
    method = DeepR(model, [first, second], l1=0.5, noise=0.0, seed=0)
    model(torch.randn(4, 12)).sum().backward()
    untouched = model[2].weight.values.detach().clone()
    first.step()
    method.step()
    assert torch.equal(model[2].weight.values.detach(), untouched)
    assert method.stats()["dropped"]["0.weight"] > 0


def test_capture_keeps_what_the_dense_gradient_needs() -> None:
    """A method that asks for it finds (x, grad_output) of every call of the step; their sum is the
    dense gradient.
    """

    class Wants(DeepR):
        def _wants_capture(self, step: int) -> bool:
            return step == 2

        def _after_step(self, pools: list[Any]) -> None:
            self.kept = [p.recorder.record.pairs if p.recorder is not None else [] for p in pools]

    torch.manual_seed(0)
    model = linear(torch.float64, 5)
    dense = nn.Sequential(
        nn.Linear(12, 16, dtype=torch.float64),
        nn.ReLU(),
        nn.Linear(16, 6, bias=False, dtype=torch.float64),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = Wants(model, optimizer, seed=0)
    for step in (1, 2, 3):
        optimizer.zero_grad()
        with torch.no_grad():
            for sparse, twin in ((model[0], dense[0]), (model[2], dense[2])):
                twin.weight.copy_(sparse.weight.to_dense())
                if sparse.bias is not None:
                    twin.bias.copy_(sparse.bias)
        dense.zero_grad()
        for _ in range(2):  # micro-batches
            x = torch.randn(5, 12, dtype=torch.float64)
            for net in (model, dense):
                net(x).square().sum().backward()
        optimizer.step()
        method.step()
        for kept, twin in zip(method.kept, (dense[0], dense[2]), strict=True):
            assert len(kept) == (2 if step == 2 else 0)
            if kept:
                total = sum(p.g.T @ p.x for p in kept)
                torch.testing.assert_close(total, twin.weight.grad)


def test_abandoned_method_is_freed() -> None:
    import gc
    import weakref

    model, optimizer, method = make()
    ref = weakref.ref(method)
    del method
    gc.collect()
    assert ref() is None
    optimizer.step()
    next(sparse_weights(model))[1].rewire(torch.tensor([0]), torch.tensor([-1]), torch.tensor([-1]))


def test_events_from_outside_keep_signs_in_step() -> None:
    model, optimizer, method = make(l1=0.0, noise=0.0)
    weight = next(sparse_weights(model))[1]
    weight.reorder()
    weight.resize(weight.capacity + 5, [optimizer])
    for pool in method.pools:
        pool.weight.values.grad = torch.zeros_like(pool.weight.values)
    before = weight.to_dense().detach().clone()
    optimizer.step()
    method.step()
    assert torch.equal(weight.to_dense(), before)
    assert isinstance(weight, SparseWeight)


def test_network_scope_under_ddp_needs_room_from_the_start() -> None:
    model = linear(torch.float32, 5)
    for _, weight in sparse_weights(model):
        weight.shared_seed = 1  # what rewire.distributed.prepare leaves
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="capacity="):
        DeepR(model, optimizer, scope="network")
    DeepR(model, optimizer)


def test_settings_that_mean_something_else_are_refused() -> None:
    _, _, method = make(scope="network")
    _, _, other = make()
    with pytest.raises(ValueError, match="scope='network'"):
        other.load_state_dict(method.state_dict())


def test_initial_shares_are_restored() -> None:
    _, _, method = make(scope="network", allotment="authors")
    state = method.state_dict()
    state["own"]["shares"] = [3.0, 5.0]
    method.load_state_dict(state)
    assert method.state_dict()["own"]["shares"] == [3.0, 5.0]


def test_waiting_connections_stay_at_zero_and_move_with_their_slots() -> None:
    _, optimizer, method = make(l1=0.2, noise=0.0, every=1000)
    weight = method.pools[0].weight
    for step in range(4):
        for pool in method.pools:
            pool.weight.values.grad = torch.full_like(pool.weight.values, -0.01 * (-1) ** step)
        optimizer.step()
        method.step()
        waiting = method._waiting[0]
        assert waiting.numel()
        assert not weight.values.detach()[waiting].any()
        places = sorted(
            zip(weight.rows[waiting].tolist(), weight.cols[waiting].tolist(), strict=True)
        )
        weight.resize(weight.capacity + 1, [optimizer])
        weight.reorder()
        moved = method._waiting[0]
        assert (
            sorted(zip(weight.rows[moved].tolist(), weight.cols[moved].tolist(), strict=True))
            == places
        )


def test_l1_from_a_schedule_is_checked_when_used() -> None:
    from rewire.schedules import Linear

    _, optimizer, method = make(l1=Linear(1.0, -1.0, 2))  # 0 at step 1, -1 at step 2
    for _ in range(2):
        for pool in method.pools:
            pool.weight.values.grad = torch.zeros_like(pool.weight.values)
        optimizer.step()
        if method.steps == 0:
            method.step()
    with pytest.raises(ValueError, match="l1 must be"):
        method.step()


def test_a_frozen_pool_that_no_optimizer_has_is_left_out() -> None:
    from rewire import param_groups

    model = linear(torch.float32, 5)
    model[2].weight.values.requires_grad_(False)
    method = DeepR(model, torch.optim.AdamW(param_groups(model, 0.1, decay_sparse=False)))
    assert [pool.name for pool in method.pools] == ["0.weight"]

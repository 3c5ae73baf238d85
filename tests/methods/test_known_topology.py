"""Allowed positions and frozen connections, kept at every step by every method that claims them.

Run over the registry, so a new method gets these tests by being registered.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from harness import CASES, LAYERS, OPTIMIZERS, Run, assert_identical, case_id, check_resume
from rewire import methods
from rewire.budget import Limits
from rewire.methods import Rewirer
from rewire.methods.criteria import drop, grow
from rewire.nn import SparseLinear, SparseWeight, from_edges, sparse_weights
from rewire.topology import Prior, active_keys, contains

Case = tuple[str, dict[str, Any]]


def expect(model: nn.Module, share: float = 0.5) -> None:
    """Let every weight keep some of its connections, and grow at ``share`` of the positions."""
    g = torch.Generator().manual_seed(5)
    for _, weight in sparse_weights(model):
        keys = active_keys(weight.index, weight.matrix_shape[1])
        others = torch.rand(weight.size, generator=g) < share
        others[keys] = True
        some = keys[torch.randperm(keys.numel(), generator=g)[: max(1, keys.numel() // 12)]]
        weight.expect(Prior.of(*weight.matrix_shape, others.nonzero().flatten(), some))


class KnownRun(Run):
    """A `Run` whose weights have priors before the method is made."""

    def make(self, seed: int) -> methods.Method:
        if all(weight.prior is None for weight in self.weights().values()):
            expect(self.model)
        return super().make(seed)


def kept(weight: SparseWeight) -> bool:
    assert weight.prior is not None
    assert weight.prior.allowed is not None
    assert weight.prior.frozen is not None
    rows, cols, _ = weight.coo()
    now = set((rows * weight.matrix_shape[1] + cols).tolist())
    assert len(now) == weight.connections
    return set(weight.prior.frozen.tolist()) <= now <= set(weight.prior.allowed.keys.tolist())


def cases(keeps: bool) -> Iterator[tuple[Case, str]]:
    """Every case whose method keeps priors (or does not), on two layer types in turn."""
    for number, case in enumerate(c for c in CASES if methods.info(c[0]).prior is keeps):
        names = list(LAYERS)
        for layer in {"linear", names[number % len(names)]}:
            yield case, layer


def ids(value: Any) -> str:
    return value if isinstance(value, str) else case_id(value)


@pytest.mark.parametrize(("case", "layer"), sorted(cases(True), key=str), ids=ids)
def test_kept_after_every_step(case: Case, layer: str) -> None:
    optimizer = list(OPTIMIZERS)[CASES.index(case) % len(OPTIMIZERS)]
    run = KnownRun(case, layer, optimizer)
    before = {name: w.connections for name, w in run.weights().items()}
    first = {name: w.fingerprint() for name, w in run.weights().items()}
    exact = methods.info(case[0]).keeps_budget == "every step" and not case[1].get("soft")
    for _ in range(3 * run.steps_per_epoch):
        run.step()
        assert all(kept(weight) for weight in run.weights().values())
        if exact:
            assert sum(w.connections for w in run.weights().values()) == sum(before.values())
    grown = sum(run.method.stats()["grown"].values())
    changed = {n: w.fingerprint() for n, w in run.weights().items()} != first
    assert not grown or changed
    run.method.finalize()
    assert all(kept(weight) for weight in run.weights().values())


#: Settings under which these methods surely change connections in twelve steps.
STRONG: dict[str, dict[str, Any]] = {
    "deep-r": {"l1": 0.05, "noise": 0.5},
    "soft-deep-r": {"l1": 0.05, "noise": 0.5, "p_min": 0.3},
    "mest": {"every": 1, "margin": 0.3},
    "dsr": {"every": 1, "magnitude": 0.1, "fraction": 0.2},
    "top-kast": {"every": 2},
    "snfs": {"every": 2, "window": 1},
    "ctre": {"every": 1},
    **{name: {"every": 1} for name in ("set", "rigl", "itop", "codaset", "copaset", "corset")},
}


@pytest.mark.parametrize("name", sorted(STRONG))
def test_methods_do_change_connections_within_them(name: str) -> None:
    run = KnownRun((name, STRONG[name]), "linear", "momentum")
    for _ in range(12):
        run.step()
        assert all(kept(weight) for weight in run.weights().values())
    assert sum(run.method.stats()["grown"].values()) > 3


def test_every_method_that_moves_connections_keeps_them_or_refuses() -> None:
    """Of the dynamic methods only SRigL refuses: one fan-in for all may not be to be had."""
    refusing = {n for n in methods.available() if not methods.info(n).prior}
    dense = {n for n in methods.available() if methods.info(n).cls.starts_dense}
    assert refusing - dense == {"srigl"}


@pytest.mark.parametrize(("case", "layer"), sorted(cases(False), key=str), ids=ids)
def test_what_a_method_does_not_keep_is_refused_by_name(case: Case, layer: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"has \d+ allowed positions, \d+ frozen connections, and \w+ with these settings "
        "does not keep allowed positions and frozen connections",
    ):
        KnownRun(case, layer)


def test_methods_for_dense_models_refuse_them() -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), SparseLinear(8, 4, edges=[(0, 1)], frozen=True)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"2 is a sparse layer .* densify it first"):
        methods.create("noiseout", model, optimizer, data=[torch.randn(4, 6)])
    for name, options in (("differentiable", {"weights": ["0"]}), ("halo", {}), ("ternary", {})):
        with pytest.raises(ValueError, match="does not keep frozen connections"):
            methods.create(name, model, optimizer, **options)


@pytest.mark.parametrize("case", [c for c in CASES if methods.info(c[0]).prior], ids=case_id)
def test_a_run_that_resumes_is_the_same(case: Case) -> None:
    """Also where the model that loads the state knows nothing of the prior beforehand."""
    number = CASES.index(case)
    begin = partial(KnownRun, case, "linear", list(OPTIMIZERS)[number % 3])

    class Blank(Run):
        """Without a prior, which comes with the state."""

    def either(**seeds: Any) -> Run:
        return Blank(case, "linear", list(OPTIMIZERS)[number % 3], **seeds) if seeds else begin()

    whole, second = check_resume(either, 4, 9, model_first=True, remake=True)
    assert_identical(whole.snapshot(), second.snapshot())
    assert all(kept(weight) for weight in second.weights().values())


def test_a_copy_goes_on_alike() -> None:
    run = KnownRun(("set", {"every": 1}), "linear", "momentum")
    model = copy.deepcopy(run.model)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    method = methods.create("set", model, optimizer, seed=7, every=1)
    for step in range(6):
        both = (run.model, run.optimizer, run.method), (model, optimizer, method)
        for one, trainer, made in both:
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
            trainer.zero_grad()
            one(x).square().mean().backward()
            trainer.step()
            made.step()
    assert_identical(dict(run.model.state_dict()), dict(model.state_dict()))


def test_a_frozen_connection_of_deep_r_waits_at_zero_with_its_sign() -> None:
    layer = from_edges([(0, 0), (1, 0), (2, 1)], 6, 4, bias=False, frozen=[(0, 0)])
    weight = layer.weight
    slot = int((weight.rows * 6 + weight.cols == 0).nonzero())
    with torch.no_grad():
        weight.values[slot] = -0.01
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    method = methods.DeepR(layer, optimizer, l1=0.5, seed=0)
    (layer(torch.zeros(1, 6)).sum()).backward()
    optimizer.step()
    method.step()
    value = weight.values.detach()[slot]
    assert (int(weight.rows[slot]), int(weight.cols[slot])) == (0, 0)
    assert value == 0
    assert torch.signbit(value)
    x = torch.tensor([[1.0, 0, 0, 0, 0, 0]])
    for _ in range(4):
        optimizer.zero_grad()
        layer(x)[0, 0].mul(5).backward()  # wants a smaller value: more of the sign it has
        optimizer.step()
        method.step()
    assert weight.values.detach()[slot] < -0.1


def test_rigl_grows_the_largest_gradients_of_the_allowed_positions() -> None:
    """Against the dense gradient."""
    g = torch.Generator().manual_seed(0)
    layer = SparseLinear(12, 8, False, connections=25, generator=g, dtype=torch.float64)
    expect(layer)
    prior = layer.weight.prior
    assert prior is not None
    assert prior.allowed is not None
    assert prior.frozen is not None
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    by_gradient = grow.ByGradient(None)
    method = Rewirer(
        layer, optimizer, drop=drop.ByMagnitude(), grow=by_gradient, fraction=0.3, every=1
    )
    x, y = (torch.randn(16, n, generator=g, dtype=torch.float64) for n in (12, 8))
    dense = layer.weight.to_dense().detach().requires_grad_()
    (x @ dense.T - y).square().mean().backward()
    assert dense.grad is not None
    optimizer.zero_grad()
    (layer(x) - y).square().mean().backward()
    optimizer.step()
    rows, cols, values = layer.weight.coo()
    keys = rows * 12 + cols
    free = ~contains(prior.frozen, keys)
    count = int(0.3 * int(free.sum()))
    order = torch.sort(values.detach().abs().where(free, torch.inf), stable=True).indices
    chosen = set(keys[order[count:]].tolist())
    ranked = torch.sort(dense.grad.abs().flatten(), descending=True, stable=True).indices.tolist()
    allowed = set(prior.allowed.keys.tolist())
    for key in ranked:
        if key in allowed and key not in chosen and len(chosen) < 25:
            chosen.add(key)
    method.step()
    rows, cols, _ = layer.weight.coo()
    assert set((rows * 12 + cols).tolist()) == chosen


@pytest.mark.parametrize("name", ["set", "deep-r", "rigl", "itop", "corset"])
def test_limits_and_a_prior_together(name: str) -> None:
    g = torch.Generator().manual_seed(3)
    limits = Limits(fan_in=5, fan_out=7, block=(4, 4, 7))
    around = torch.stack([torch.randint(0, 12, (120,), generator=g), torch.arange(120) % 16])
    edges = [(0, 0), (3, 5), (7, 9)]
    layer = SparseLinear(
        12, 16, connections=40, limits=limits, edges=edges, frozen=True, allowed=around, generator=g
    )
    optimizer = torch.optim.SGD(layer.parameters(), 0.3)
    data = {"data": [torch.randn(20, 12)]} if methods.info(name).takes_data else {}
    options = STRONG[name]
    method = methods.create(name, layer, optimizer, seed=1, **data, **options)
    for _ in range(12):
        optimizer.zero_grad()
        layer(torch.randn(8, 12, generator=g)).square().mean().backward()
        optimizer.step()
        method.step()
        assert kept(layer.weight)
        assert int(layer.weight.fan_in().max()) <= 5
        assert int(layer.weight.fan_out().max()) <= 7
    assert sum(method.stats()["grown"].values()) > 3


def test_a_composition_keeps_what_its_growth_keeps_and_what_is_frozen() -> None:
    layer = SparseLinear(12, 16, connections=40)
    expect(layer)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)

    class Blind(grow.Grow):
        def __call__(self, *arguments: Any) -> Any:
            return grow.Random()(*arguments)

    class Greedy(drop.Drop):
        def __call__(self, pool: methods.core.base.Pool, fraction: float) -> torch.Tensor:
            return pool.weight.active()

    with pytest.raises(ValueError, match="does not keep allowed positions:"):
        Rewirer(layer, optimizer, drop=drop.ByMagnitude(), grow=Blind(), fraction=0.2)
    method = Rewirer(layer, optimizer, drop=Greedy(), grow=grow.Random(), fraction=1.0, every=1)
    layer(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    method.step()
    assert kept(layer.weight)
    assert layer.weight.prior is not None
    assert layer.weight.prior.frozen is not None
    assert method.stats()["grown"]["weight"] == 40 - layer.weight.prior.frozen.numel()


def test_where_nothing_may_change_methods_that_rewire_are_refused() -> None:
    frozen = from_edges([(0, 1), (2, 3)], frozen=True)
    with pytest.raises(ValueError, match="all connections of weight are frozen"):
        methods.SET(frozen, torch.optim.SGD(frozen.parameters(), 0.1))
    edges = [(0, 1), (2, 3)]
    full = from_edges(edges, allowed=edges)
    with pytest.raises(ValueError, match=r"K = 2 of 2 allowed positions"):
        methods.SET(full, torch.optim.SGD(full.parameters(), 0.1))
    methods.Static(frozen, torch.optim.SGD(frozen.parameters(), 0.1))


def test_a_budget_below_what_is_frozen_is_refused() -> None:
    layer = SparseLinear(8, 6, density=1.0, frozen=[(0, 0), (1, 1), (2, 2)])
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with pytest.raises(ValueError, match="has 3 frozen connections and is to end with 2"):
        methods.create("magnitude", layer, optimizer, connections=2)
    method = methods.create("magnitude", layer, optimizer, connections=3, cycles=1, every_epochs=1)
    layer(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    method.step()
    method.end_epoch()
    rows, cols, _ = layer.weight.coo()
    assert (rows.tolist(), cols.tolist()) == ([0, 1, 2], [0, 1, 2])

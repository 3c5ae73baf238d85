"""The CosineSET family: similarities equal scikit-learn's, choices equal brute force on dense
matrices.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics.pairwise import cosine_distances
from torch import Tensor, nn
from torch.nn import functional as F

from harness import Run
from rewire import methods
from rewire.budget import Limits
from rewire.methods import Pool, Rewirer
from rewire.methods.core.base import Purpose
from rewire.methods.criteria.drop import ByMagnitudeAndSign
from rewire.methods.criteria.grow import BySimilarity
from rewire.methods.criteria.similarity import Cosines, Similarity
from rewire.methods.criteria.topk import exponential
from rewire.nn import SparseConv2d, SparseLinear
from rewire.ops import Draw, Pair, uniforms

NAMES = ["codaset", "copaset", "corset", "codacorset", "copacorset"]
WEIGHTED = {"corset", "codacorset", "copacorset"}
DRAWN = {"copaset", "copacorset"}


def sklearn(x: Tensor, y: Tensor) -> Tensor:
    """abs(1 - cosine distance) of the columns of y (rows of the result) and of x."""
    return torch.from_numpy(
        np.abs(1 - cosine_distances(y.detach().numpy().T, x.detach().numpy().T))
    )


def everywhere(cosine: Cosines, layer: Any) -> Tensor:
    """All of a weight's similarities by way of `at`: a full index."""
    full = type(layer.weight).from_dense(torch.ones_like(layer.weight.to_dense()))
    out = cosine.at(full.index, full.capacity, full.rows, full.cols)
    return out[full.active()].view(full.matrix_shape)


def exponentials_at(seed: int, step: int, pool: Pool, positions: Tensor) -> Tensor:
    """The numbers that similarities of these positions are divided by in a draw."""
    return exponential(uniforms(Draw(seed, step, pool.stream(Purpose.TIES), 1e-30), positions))


def pool_of(layer: SparseLinear) -> Pool:
    return Pool(0, "w", layer.weight, torch.optim.SGD(layer.parameters(), lr=0.1), 0)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_similarities_are_sklearns(dtype: torch.dtype, close: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 7, dtype=dtype), torch.randn(40, 5, dtype=dtype)
    x[:, 2], y[:, 3] = 0, 0
    x[:, 4] = -3 * y[:, 1]
    layer = SparseLinear(7, 5, connections=1, dtype=dtype)
    cosine, expected = (
        Cosines([Pair(x[:25], y[:25]), Pair(x[25:], y[25:])], layer.weight),
        sklearn(x, y).to(dtype),
    )
    assert float(expected[1, 4]) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(
        torch.cat([cosine.block(0, 2), cosine.block(2, 5)]), expected, atol=close, rtol=0
    )
    found = everywhere(cosine, layer)
    torch.testing.assert_close(found, expected, atol=close, rtol=0)
    assert not found[:, 2].any()
    assert not found[3].any()


def test_similarities_of_a_convolution_are_sklearns_on_unfolded_input() -> None:
    torch.manual_seed(0)
    layer = SparseConv2d(4, 6, (2, 3), padding=1, groups=2, density=0.5, dtype=torch.float64)
    x = torch.randn(5, 4, 6, 5, dtype=torch.float64)
    x[:, 1] = 0
    y = layer(x).detach()
    cosine = Cosines([Pair(x, y, layer._geometry)], layer.weight)
    columns = F.unfold(x, (2, 3), padding=1).movedim(1, 2).reshape(-1, 24)
    outputs = y.movedim(1, -1).reshape(-1, 6)
    expected = torch.cat(
        [sklearn(columns[:, :12], outputs[:, :3]), sklearn(columns[:, 12:], outputs[:, 3:])]
    )
    torch.testing.assert_close(cosine.block(0, 6), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(cosine.block(2, 5), expected[2:5], atol=1e-12, rtol=0)
    torch.testing.assert_close(everywhere(cosine, layer), expected, atol=1e-12, rtol=0)


# --- choices --------------------------------------------------------------------------------------


def dense_sim(model: nn.Sequential, x: Tensor, centred: bool) -> list[Tensor]:
    with torch.no_grad():
        a = model[0](x)
        b = model[2](a.relu())
    return [sklearn(x - x.mean(0) if centred else x, a), sklearn(a, b)]


def dense_choice(
    name: str, weight: Tensor, there: Tensor, sim: Tensor, fraction: float, keys: Tensor
) -> Tensor:
    """Which positions are there afterwards, by sorting whole matrices (random additions
    excepted).
    """
    score = (weight * sim if name in WEIGHTED else weight).flatten()
    stays = there.flatten().clone()
    for side in (score >= 0, score < 0):
        own = (there.flatten() & side).nonzero().flatten().tolist()
        own.sort(key=lambda i: abs(float(score[i])))
        stays[own[: int(fraction * len(own))]] = False
    wanted = (keys if name in DRAWN else sim).flatten()
    free = (~stays).nonzero().flatten().tolist()
    free.sort(key=lambda i: -float(wanted[i]))
    if name != "corset":
        stays[free[: int(there.sum() - stays.sum())]] = True
    return stays.view_as(there)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_choice_is_that_of_brute_force(name: str, centred: bool) -> None:
    torch.manual_seed(5)
    options: dict[str, Any] = {"dtype": torch.float64}
    model = nn.Sequential(
        SparseLinear(12, 16, connections=60, **options),
        nn.ReLU(),
        SparseLinear(16, 10, connections=50, **options),
        nn.Tanh(),
        SparseLinear(10, 3, connections=9, **options),
    )
    # as bright as pixels may be
    x = torch.randn(30, 12, dtype=torch.float64) + torch.linspace(0, 3, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = [x[:20], (x[20:], None)]
    options = {} if centred else {"centred": False}  # the default is the authors' standardised data
    method = methods.create(name, model, optimizer, data=data, fraction=0.4, seed=11, **options)
    for epoch in range(1, 4):
        model(x).square().mean().backward()
        optimizer.step()
        method.step()
        before = [
            (w.to_dense().detach(), w.fingerprint()) for w in (model[0].weight, model[2].weight)
        ]
        masks = [
            type(p.weight)
            .from_coo(p.weight.matrix_shape, *p.weight.coo()[:2], torch.ones(p.weight.connections))
            .to_dense()
            .bool()
            for p in method.pools
        ]
        sims = dense_sim(model, x, centred)
        method.end_epoch()
        for pool, sim, (dense, _), mask in zip(method.pools, sims, before, masks, strict=False):
            rows, cols, values = pool.weight.coo()
            positions = torch.arange(sim.numel())
            keys = sim.clamp(min=1e-30) / exponentials_at(11, epoch, pool, positions).view_as(sim)
            after = torch.zeros_like(mask)
            after[rows, cols] = True
            expected = dense_choice(name, dense, mask, sim, 0.4, keys)
            if name == "corset":
                # all that must stay; the rest is random
                assert (after & expected).sum() == expected.sum()
            else:
                assert torch.equal(after, expected)
            kept = values.detach() != 0
            # others keep their values
            assert torch.equal(values.detach()[kept], dense[rows, cols][kept])
            assert pool.weight.connections == int(mask.sum())
    assert method.stats()["updates"] == 3


def test_removal_counts_are_per_sign_of_weight_times_similarity() -> None:
    torch.manual_seed(2)
    layer = SparseLinear(9, 11, connections=60)
    pool = pool_of(layer)
    source = Similarity(layer, [torch.randn(20, 9)])
    source.record([pool], 0, 1)
    values, sim = layer.weight.values.detach(), source.active(pool)
    assert sim is not None
    for fraction in (0.0, 0.25, 1.0):
        dropped = ByMagnitudeAndSign(source)(pool, fraction)
        for side in (values > 0, values < 0):
            own, gone = side.nonzero().flatten(), dropped[side[dropped]]
            assert gone.numel() == int(fraction * own.numel())
            stays = own[~torch.isin(own, gone)]
            if gone.numel() and stays.numel():
                assert (values * sim)[gone].abs().max() <= (values * sim)[stays].abs().min()


# --- drawing in proportion ------------------------------------------------------------------------


def test_exponential_numbers() -> None:
    pool = pool_of(SparseLinear(5, 5, connections=3))
    whole = exponentials_at(3, 4, pool, torch.arange(50_001))
    assert scipy.stats.kstest(whole.numpy(), "expon").pvalue > 0.01
    some = torch.tensor([50_000, 3, 17, 3, 40_002])
    assert torch.equal(exponentials_at(3, 4, pool, some), whole[some])
    assert not torch.equal(exponentials_at(3, 5, pool, torch.arange(9)), whole[:9])


@pytest.mark.parametrize("draw", ["top", "proportional"])
def test_choice_in_a_layer_that_is_searched_with_a_sample(draw: Any) -> None:
    torch.manual_seed(2)
    layer = SparseLinear(900, 1000, density=0.05, bias=False)
    source = Similarity(layer, [torch.randn(20, 900) * torch.rand(900)], output_layer=True)
    pool, weight = pool_of(layer), layer.weight
    source.record([pool], 5, 1)
    cosine, dropped = source.of(pool), weight.active()[::3]
    assert cosine is not None
    score = cosine.block(0, 1000).double()
    if draw == "proportional":
        score = score / exponentials_at(5, 1, pool, torch.arange(900_000)).view(1000, 900)
    kept = torch.ones(weight.capacity, dtype=torch.bool)
    kept[dropped] = False
    active = torch.zeros(1000, 900, dtype=torch.bool)
    active[weight.rows[kept].long(), weight.cols[kept].long()] = True
    rows, cols = BySimilarity(source, draw)(pool, dropped, dropped.numel(), 5, 1)
    grown = torch.zeros_like(active)
    grown[rows, cols] = True
    assert int(grown.sum()) == dropped.numel()
    assert not (grown & active).any()
    bar = score[~active].topk(dropped.numel()).values[-1]
    assert score[grown].min() >= bar * (1 - 1e-5)
    assert (grown | active)[score > bar * (1 + 1e-5)].all()


@pytest.mark.parametrize("candidates", [None, 100])
def test_draws_follow_the_law(candidates: int | None) -> None:
    """P(set) is the sum over its orders of successive draws in proportion to what is left."""
    torch.manual_seed(1)
    layer = SparseLinear(3, 2, connections=2, dtype=torch.float64)
    pool, x = pool_of(layer), torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        nn.init.normal_(layer.bias)
        sim = sklearn(x, layer(x)).flatten()
    source = Similarity(layer, [x])
    source.record([pool], 0, 1)
    rows, cols, _ = layer.weight.coo()
    dropped = layer.weight.active()[:1]  # candidates like any other
    free = sorted(set(range(6)) - {int(rows[1] * 3 + cols[1])})
    law: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(free, 2):
        first = sim[order[0]] / sim[free].sum()
        second = sim[order[1]] / (sim[free].sum() - sim[order[0]])
        law[tuple(sorted(order))] = law.get(tuple(sorted(order)), 0) + float(first * second)
    grow, counts, n = BySimilarity(source, "proportional", candidates), dict.fromkeys(law, 0), 4000
    for step in range(n):
        found = grow(pool, dropped, 2, 7, step)
        counts[tuple(sorted((found[0] * 3 + found[1]).tolist()))] += 1
    test = scipy.stats.chisquare(list(counts.values()), [n * p for p in law.values()])
    assert math.isclose(sum(law.values()), 1)
    assert test.pvalue > 1e-3


def test_similarity_zero_is_drawn_last_but_drawn() -> None:
    layer = SparseLinear(4, 5, connections=1, bias=False)
    layer.weight.rewire(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), 1.0)
    pool, x = pool_of(layer), torch.zeros(6, 4)
    x[:, 0] = 1
    x[:3, 2] = 1
    source = Similarity(layer, [x])  # only row 0 and columns 0 and 2 are not silent
    source.record([pool], 0, 1)
    last = set()
    for step in range(40):
        rows, cols = BySimilarity(source, "proportional")(pool, layer.weight.active(), 4, 3, step)
        positions = (rows * 4 + cols).tolist()
        assert {0, 2} < set(positions)
        last |= set(positions)
    assert last == set(range(20))


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["top", "proportional"])
def test_enough_candidates_are_all_candidates(draw: Any) -> None:
    torch.manual_seed(0)
    layer = SparseLinear(9, 8, connections=20)
    pool = pool_of(layer)
    source = Similarity(layer, [torch.randn(12, 9)])
    source.record([pool], 0, 1)
    dropped = layer.weight.active()[::3]
    whole = BySimilarity(source, draw)(pool, dropped, 7, 5, 1)
    sampled = BySimilarity(source, draw, candidates=1000)(pool, dropped, 7, 5, 1)
    assert set(zip(*(t.tolist() for t in whole), strict=True)) == set(
        zip(*(t.tolist() for t in sampled), strict=True)
    )
    few = BySimilarity(source, draw, candidates=1)(pool, dropped, 7, 5, 1)
    assert few[0].numel() == 7


def test_a_huge_layer_takes_candidates_by_itself() -> None:
    layer = SparseLinear(200_000, 200_000, connections=3000, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    method = methods.CoPACoRSET(layer, optimizer, data=[torch.randn(4, 200_000)], seed=0)
    layer(torch.randn(2, 200_000)).sum().backward()
    optimizer.step()
    method.step()
    method.end_epoch()
    assert method.stats()["grown"]["weight"] == method.stats()["dropped"]["weight"] > 890


def test_the_output_layer_does_as_set_does() -> None:
    def topologies(name: str, **options: Any) -> list[int]:
        torch.manual_seed(3)
        model = nn.Sequential(
            SparseLinear(12, 9, connections=40), nn.ReLU(), SparseLinear(9, 6, connections=20)
        )
        optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(20, 12)
        data = {"data": [x]} if methods.info(name).takes_data else {}
        method = methods.create(name, model, optimizer, seed=5, **data, **options)
        model(x).square().mean().backward()
        optimizer.step()
        method.step()
        method.end_epoch()
        return [p.weight.fingerprint() for p in method.pools]

    plain, default, included = (
        topologies("set"),
        topologies("codacorset"),
        topologies("codacorset", output_layer=True),
    )
    assert default[1] == plain[1]
    assert default[0] == included[0] != plain[0]
    assert included[1] != plain[1]


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("name", ["set", "codaset"])
def test_momentum_reset_is_a_new_optimizer(name: str, optimizer: str) -> None:
    run = Run((name, {"optimizer_state": "reset"}), optimizer=optimizer)
    for _ in range(run.steps_per_epoch):
        run.step()
    assert not run.optimizer.state
    run.step()
    assert run.optimizer.state
    kept = Run((name, {}), optimizer=optimizer)
    for _ in range(kept.steps_per_epoch):
        kept.step()
    assert len(kept.optimizer.state) == 3


def test_recordings_are_forgotten_and_composed_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseLinear(12, 9, connections=40), nn.ReLU(), SparseLinear(9, 6, connections=20)
    )
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(20, 12)
    source = Similarity(model, [x], samples=10)
    method = Rewirer(
        model,
        optimizer,
        drop=ByMagnitudeAndSign(source),
        grow=BySimilarity(source),
        fraction=0.3,
        every=1,
        seed=0,
    )
    model(x).sum().backward()
    optimizer.step()
    method.step()
    assert method.stats()["updates"] == 1
    assert source.of(method.pools[0]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates must be a whole number of at least 1"),
        ({"optimizer_state": "some"}, "one of 'keep', 'reset'"),
        ({"samples": -1}, "samples must be"),
        ({"fraction": 2.0}, "fraction must be"),
        ({"mode": "test"}, "mode must be"),
        ({"data": iter([])}, "used up after once"),
    ],
)
def test_bad_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    layer = SparseLinear(4, 4, connections=5)
    with pytest.raises(ValueError, match=message):
        methods.CoDACoRSET(
            layer,
            torch.optim.SGD(layer.parameters(), lr=0.1),
            **({"data": [torch.randn(3, 4)]} | options),
        )


@pytest.mark.parametrize(
    ("draw", "candidates"), [("top", None), ("proportional", None), ("top", 1000)]
)
def test_under_limits_the_best_that_fit_are_grown(draw: Any, candidates: int | None) -> None:
    """Exactly what a loop over all dormant positions, best first, would take."""
    torch.manual_seed(0)
    layer = SparseLinear(9, 8, connections=40, limits=Limits(fan_in=6))
    pool = pool_of(layer)
    source = Similarity(layer, [torch.randn(12, 9)])
    source.record([pool], 0, 1)
    dropped = layer.weight.active()[::5]
    stays = torch.zeros(8, 9, dtype=torch.bool)
    rows, cols, _ = layer.weight.coo()
    stays[rows, cols] = True
    stays[layer.weight.rows[dropped].long(), layer.weight.cols[dropped].long()] = False
    cosine = source.of(pool)
    assert cosine is not None
    scores = cosine.block(0, 8)
    if draw == "proportional":
        scores = scores / exponentials_at(5, 1, pool, torch.arange(72)).view(8, 9)
    expected = stays.clone()
    for place in scores.flatten().argsort(descending=True).tolist():
        r, c = divmod(place, 9)
        if expected.sum() < 40 and not expected[r, c] and expected[r].sum() < 6:
            expected[r, c] = True
    grown = BySimilarity(source, draw, candidates)(pool, dropped, dropped.numel(), 5, 1)
    stays[grown] = True
    assert torch.equal(stays, expected)


def test_ctre_refuses_limits() -> None:
    layer = SparseLinear(9, 8, connections=40, limits=Limits(fan_in=6))
    with pytest.raises(ValueError, match=r"CTRE .*does not keep a limit on fan-in"):
        methods.CTRE(layer, torch.optim.SGD(layer.parameters(), lr=0.1), data=[torch.randn(3, 9)])


@pytest.mark.parametrize("name", ["codacorset", "ctre"])
def test_training_data_must_be_given(name: str) -> None:
    model = nn.Sequential(SparseLinear(6, 4, density=0.5))
    cls, optimizer = methods.info(name).cls, torch.optim.SGD(model.parameters(), lr=0.1)
    for make in (lambda: methods.create(name, model, optimizer), lambda: cls(model, optimizer)):
        with pytest.raises(ValueError, match=f"{cls.__name__} looks at activations: give it data="):
            make()

"""CTRE: what it looks at, the switch of "seq", the replacement of "sim", values of what grows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics.pairwise import cosine_distances
from torch import Tensor, nn

from harness import Run
from rewire import methods
from rewire.methods.criteria.grow import Random
from rewire.nn import SparseLinear


def made(**options: Any) -> tuple[nn.Sequential, methods.CTRE, Tensor]:
    torch.manual_seed(4)
    model = nn.Sequential(
        SparseLinear(10, 14, connections=60, dtype=torch.float64),
        nn.ReLU(),
        SparseLinear(14, 4, connections=30, dtype=torch.float64),
    )
    x = torch.randn(25, 10, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, methods.CTRE(model, optimizer, data=[(x,)], seed=6, **options), x


def train_step(model: nn.Module, method: methods.CTRE, x: Tensor) -> None:
    loss = model(x).square().mean()
    method.optimizers[0].zero_grad()
    loss.backward()
    method.optimizers[0].step()
    method.step()


def places(weight: Any) -> set[int]:
    rows, cols, _ = weight.coo()
    return set((rows * weight.matrix_shape[1] + cols).tolist())


def sims(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        a = model[0](x).relu()
        p = model[2](a).softmax(1)
    return [
        torch.from_numpy(np.abs(1 - cosine_distances(u.numpy().T, v.numpy().T)))
        for u, v in ((a, x), (p, a))
    ]


def picks(weight: Any, sim: Tensor, count: int) -> tuple[set[int], set[int]]:
    """What magnitude drops, and the most similar positions that are not kept, by sorting
    everything.
    """
    dense = weight.to_dense().detach().flatten()
    dropped = set(sorted(places(weight), key=lambda i: abs(float(dense[i])))[:count])
    free = set(range(dense.numel())) - (places(weight) - dropped)
    return dropped, set(sorted(free, key=lambda i: -float(sim.flatten()[i]))[:count])


@pytest.mark.parametrize("variant", ["seq", "sim"])
def test_choice_is_that_of_brute_force(variant: Any) -> None:
    model, method, x = made(variant=variant, fraction=0.4)
    seen = 0
    for _ in range(4):
        train_step(model, method, x)
        weights = [model[0].weight, model[2].weight]
        counts = [int(0.4 * w.connections) for w in weights]
        before = [places(w) for w in weights]
        expected = [picks(w, s, n) for w, s, n in zip(weights, sims(model, x), counts, strict=True)]
        method.end_epoch(lambda _: 0.5)
        for weight, old, (dropped, wanted) in zip(weights, before, expected, strict=True):
            after, kept = places(weight), old - dropped
            assert len(after) == weight.connections == len(old)
            if variant == "seq":
                assert after == kept | wanted
            else:
                assert after >= kept | (wanted - dropped)
                seen += len(wanted & dropped)
    assert variant == "seq" or seen > 0  # picks that had to be replaced did occur


def test_replacements_are_uniform() -> None:
    """Over what is neither kept nor picked, just-dropped positions included."""
    model, method, x = made(fraction=0.4)
    train_step(model, method, x)
    pool = method.pools[0]
    method._similar.source.record(method.pools, 0, 1)
    dropped_slots = method.drop(pool, 0.4)
    n = dropped_slots.numel()
    dropped, wanted = picks(pool.weight, sims(model, x)[0], n)
    kept, lacking = places(pool.weight) - dropped, len(wanted & dropped)
    assert lacking > 0
    counts = torch.zeros(140)
    for step in range(1000):
        rows, cols = method._similar(pool, dropped_slots, n, 9, step)
        found = set((rows * 10 + cols).tolist())
        assert len(found) == n
        counts[list(found - (wanted - dropped))] += 1
    free = sorted(set(range(140)) - kept - (wanted - dropped))
    assert counts.sum() == counts[free].sum() == 1000 * lacking
    assert scipy.stats.chisquare(counts[free].numpy()).pvalue > 1e-3


def test_seq_turns_to_random_growth_for_good() -> None:
    model, method, x = made(variant="seq", patience=2)
    scores = [0.5, 0.6, 0.6, 0.55, 0.9, 0.95]
    kinds = []
    for score in scores:
        train_step(model, method, x)
        method.end_epoch(lambda _, score=score: score)
        kinds.append(isinstance(method.grow, Random))
    assert kinds == [False, False, False, True, True, True]
    again = made(variant="seq", patience=2)[1]
    again.load_state_dict(method.state_dict())
    assert (again._best, again._since) == (0.6, 2)
    with pytest.raises(ValueError, match="patience=2, but this one has 40"):
        made(variant="seq")[1].load_state_dict(method.state_dict())


def test_seq_without_a_score_is_refused() -> None:
    model, method, x = made(variant="seq")
    train_step(model, method, x)
    with pytest.raises(ValueError, match="variant='sim'"):
        method.end_epoch()
    model, method, x = made(variant="sim")
    train_step(model, method, x)
    method.end_epoch()


@pytest.mark.parametrize("new_values", ["uniform", "zero"])
def test_what_is_dropped_and_grown_at_once_stays_as_it_was(new_values: Any) -> None:
    model, method, x = made(variant="seq", fraction=0.4, new_values=new_values)
    train_step(model, method, x)
    weight = model[0].weight
    mean = float(weight.values.detach().abs().mean())
    dropped, wanted = picks(weight, sims(model, x)[0], 24)
    dense = weight.to_dense().detach().flatten()
    state = method.optimizers[0].state[weight.values]["momentum_buffer"]
    rows, cols, _ = weight.coo()
    momentum = dict(zip((rows * 10 + cols).tolist(), state[weight.active()].tolist(), strict=True))
    again, new = dropped & wanted, wanted - dropped
    assert again
    assert new
    method.end_epoch(lambda _: 1.0)
    rows, cols, values = weight.coo()
    after = state[weight.active()].tolist()
    for key, value, m in zip((rows * 10 + cols).tolist(), values.tolist(), after, strict=True):
        if key in new:
            assert m == 0
            assert abs(value) <= mean
            assert (value == 0) == (new_values == "zero")
        else:
            assert value == dense[key]
            assert m == momentum[key]
    assert method.stats()["grown"]["0.weight"] == len(new)


def test_new_values_fill_their_interval() -> None:
    run = Run(("ctre", {"fraction": 1.0}))
    weight = run.weights()["0.weight"]
    mean, drawn = float(weight.values.detach().abs().mean()), []
    for step in range(200):
        assert run.method.values is not None
        drawn.append(run.method.values(run.method.pools[0], 40, 3, step))
    test = scipy.stats.kstest(torch.cat(drawn).numpy(), scipy.stats.uniform(-mean, 2 * mean).cdf)
    assert test.pvalue > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "both"}, "one of 'sim', 'seq'"),
        ({"patience": 0}, "patience must be a whole number of epochs"),
        ({"new_values": "one"}, "one of 'uniform', 'zero'"),
        ({"fraction": -1.0}, "fraction must be"),
    ],
)
def test_bad_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)

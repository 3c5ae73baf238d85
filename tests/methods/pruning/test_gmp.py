"""GMP's cubic and GraNet's regrowth by gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dense_gradients import batches, dense_gradients, keys
from harness import LAYERS
from rewire.methods import GMP, GraNet
from rewire.nn import sparse_weights


def steps(model: nn.Module, optimizer: Any, method: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        ((x, y),) = batches(1, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        method.step()


def test_gmp_follows_the_cubic_and_drops_the_smallest() -> None:
    model = LAYERS["linear"](torch.float64, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = GMP(model, optimizer, connections=[10, 12], every=2, begin=2, until=8, seed=0)
    seen = []
    for step in range(1, 11):
        steps(model, optimizer, method, step, step)
        seen.append([w.connections for _, w in sparse_weights(model)])
        assert all(w.capacity == w.connections for _, w in sparse_weights(model))
    cubic = [
        [k + round((k0 - k) * (1 - t / 6) ** 3) for k0, k in ((40, 10), (30, 12))]
        for t in (0, 2, 4, 6)
    ]
    assert seen == [[40, 30], *[c for c in cubic for _ in range(2)], cubic[-1]]
    assert method.updates == 4


def test_granet_cuts_over_the_network_and_regrows_where_gradients_are_largest() -> None:
    model = LAYERS["linear"](torch.float64, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = GraNet(
        model,
        optimizer,
        connections=40,
        fraction=lambda t: 0.25,
        every=4,
        until=8,
        candidates=None,
        seed=0,
    )
    steps(model, optimizer, method, 1, 3)
    data = batches(1, 4)
    truth = dense_gradients(model, data)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    optimizer.step()
    weights = dict(sparse_weights(model))
    scored = sorted(
        (float(v.abs()), name, int(r * w.matrix_shape[1] + c))
        for name, w in weights.items()
        for r, c, v in zip(*(t.detach() for t in w.coo()), strict=True)
    )
    total = 40 + round(30 * 0.125)
    left: dict[str, list[int]] = {name: [] for name in weights}
    for _, name, key in scored[-total:]:
        left[name].append(key)  # smallest first
    method.step()
    for name, weight in weights.items():
        n = int(0.25 * len(left[name]))
        kept = set(left[name][n:])
        free = sorted(
            set(range(weight.size)) - kept, key=lambda k: -float(truth[name].flatten()[k].abs())
        )
        assert keys(weight) == kept | set(free[:n])
        assert weight.capacity == weight.connections == len(left[name])
    steps(model, optimizer, method, 5, 9)
    assert sum(w.connections for w in weights.values()) == 40


@pytest.mark.parametrize("method", [GMP, GraNet])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "until, the step of the last cut"),
        ({"until": 5, "begin": 5}, "until must be"),
        ({"until": 5, "every": 0}, "every must be"),
        ({"until": 5, "begin": "now"}, "begin must be"),
        ({"until": 5, "density": 2.0}, "density"),
    ],
)
def test_bad_settings_are_refused(method: Any, settings: dict[str, Any], message: str) -> None:
    model = LAYERS["linear"](torch.float32, 1)
    with pytest.raises(ValueError, match=message):
        method(model, torch.optim.SGD(model.parameters(), lr=0.1), **({"density": 0.1} | settings))

"""First values: what they are in each row, and what becomes of signals in a deep network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire.budget import Limits
from rewire.nn import (
    SparseConv2d,
    SparseGRU,
    SparseLinear,
    SparseLSTM,
    SparseMultiheadAttention,
    SparseRNN,
    SparseWeight,
)
from rewire.nn.layers.initial import INITS

#: Each layer type with 12 x 20 or the like potential connections a weight, and its dense twin.
LAYERS: dict[str, tuple[Callable[..., Any], Callable[[], nn.Module]]] = {
    "linear": (lambda **o: SparseLinear(40, 60, **o), lambda: nn.Linear(40, 60)),
    "conv": (
        lambda **o: SparseConv2d(8, 12, 3, groups=2, **o),
        lambda: nn.Conv2d(8, 12, 3, groups=2),
    ),
    "rnn": (lambda **o: SparseRNN(20, 30, 2, **o), lambda: nn.RNN(20, 30, 2)),
    "lstm": (
        lambda **o: SparseLSTM(20, 30, proj_size=9, **o),
        lambda: nn.LSTM(20, 30, proj_size=9),
    ),
    "gru": (
        lambda **o: SparseGRU(20, 30, bidirectional=True, **o),
        lambda: nn.GRU(20, 30, bidirectional=True),
    ),
    "attention": (
        lambda **o: SparseMultiheadAttention(24, 3, kdim=40, vdim=30, **o),
        lambda: nn.MultiheadAttention(24, 3, kdim=40, vdim=30),
    ),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def dense_bounds(make: Callable[[], nn.Module]) -> dict[str, float]:
    """What PyTorch draws the weights of the twin within."""
    torch.manual_seed(0)
    biggest: dict[str, float] = {}
    for _ in range(20):
        for name, parameter in make().named_parameters():
            biggest[name] = max(biggest.get(name, 0.0), float(parameter.detach().abs().max()))
    return biggest


def pools(layer: nn.Module) -> dict[str, SparseWeight]:
    return dict(rewire.sparse_weights(layer))


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_is_drawn_as_one_of_the_dense_layer_with_as_many_inputs(name: str) -> None:
    make, twin = LAYERS[name]
    torch.manual_seed(1)
    layer = make(density=0.2)
    bounds = dense_bounds(twin)
    for path, weight in pools(layer).items():
        rows, cols, values = weight.coo()
        scaled = (
            values.detach() * (weight.fan_in()[rows] / weight.matrix_shape[1]).sqrt() / bounds[path]
        )
        assert scaled.abs().max() < 1.01
        assert float(scaled.square().mean()) == pytest.approx(1 / 3, rel=0.3)  # U(-1, 1)
        assert cols.numel() == weight.connections


@pytest.mark.parametrize("name", LAYERS)
def test_at_density_1_it_is_the_dense_layer(name: str) -> None:
    make = LAYERS[name][0]
    auto = make(density=1.0, generator=seeded())
    for init in INITS:
        same = make(density=1.0, generator=seeded(), init=init)
        for mine, theirs in zip(auto.parameters(), same.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
    for path, bound in dense_bounds(LAYERS[name][1]).items():
        if path in pools(auto):
            assert float(pools(auto)[path].values.detach().abs().max()) == pytest.approx(
                bound, rel=0.1
            )


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("init", INITS)
def test_drawing_again_and_from_a_generator(name: str, init: Any) -> None:
    layer = LAYERS[name][0](density=0.2, generator=seeded(), init=init)
    before = {path: weight.fingerprint() for path, weight in pools(layer).items()}
    drawn = []
    for _ in range(2):
        layer.reset_parameters(torch.Generator().manual_seed(3), init=init)
        drawn.append([p.detach().clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert {path: weight.fingerprint() for path, weight in pools(layer).items()} == before
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(2.0)
    layer.reset_weights(init=init)
    values = {f"{path}.values" for path in pools(layer)}
    for path, parameter in layer.named_parameters():
        assert bool((parameter == 2.0).any()) == (path not in values)
    with pytest.raises(
        ValueError, match="init must be one of 'auto', 'dense', 'sparse', not 'both'"
    ):
        layer.reset_parameters(init="both")
    with pytest.raises(ValueError, match="init must be one of"):
        LAYERS[name][0](density=0.2, init="both")


@pytest.mark.parametrize(
    ("init", "bound"), [("dense", 1 / math.sqrt(1000)), ("sparse", 1 / math.sqrt(16))]
)
def test_one_bound_for_all_rows(init: Any, bound: float) -> None:
    layer = SparseLinear(1000, 500, connections=500 * 16, capacity=500 * 16 + 100, init=init)
    values = layer.weight.values.detach()
    assert 0.98 * bound < values.abs().max() <= bound
    assert layer.bias.abs().max() <= 1 / math.sqrt(1000)
    assert not values[layer.weight.rows < 0].any()
    few = SparseLinear(1000, 500, connections=3, init="sparse")
    assert few.weight.values.abs().max() <= 1


def depth_profile(make: Callable[[], nn.Module], layers: int = 10, width: int = 400) -> Tensor:
    """Mean squares of what each of ``layers`` layers gives, with ReLU between: (layers,), mean of
    three networks.
    """
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(64, width)
        for _ in range(layers):
            x = make()(x)
            found.append(float(x.detach().square().mean()))
            x = x.relu()
    return torch.tensor(found).view(3, layers).mean(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fan_in", [2, 5, 30])
def test_signals_reach_the_end_of_a_deep_network_as_in_the_dense_one(
    fan_in: int, bias: bool
) -> None:
    dense = depth_profile(lambda: nn.Linear(400, 400, bias))
    auto = depth_profile(lambda: SparseLinear(400, 400, bias, connections=fan_in * 400))
    ratio = auto / dense
    assert ((ratio > 0.4) & (ratio < 2.5)).all(), ratio
    if not bias:  # what the rule is for: ten layers of the dense layer's values lose all of it
        small = depth_profile(
            lambda: SparseLinear(400, 400, bias, connections=fan_in * 400, init="dense")
        )
        assert small[-1] < 1e-6 * dense[-1]


def test_sparsify_draws_for_the_rows_there_are() -> None:
    def draw(**more: Any) -> SparseWeight:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 100))
        biases = [model.get_parameter(f"{i}.bias").detach().clone() for i in (0, 2)]
        rewire.sparsify(model, density=0.05, distribution="uniform", **more)
        assert torch.equal(model.get_parameter("0.bias"), biases[0])
        assert torch.equal(model.get_parameter("2.bias"), biases[1])
        weight = model[0].weight
        assert isinstance(weight, SparseWeight)
        return weight

    for limits in (None, Limits(fan_in=10)):
        weight = draw(limits=limits)
        rows, _, values = weight.coo()
        scaled = values.detach().abs() * weight.fan_in()[rows].sqrt()
        assert 0.98 < scaled.max() <= 1.0001
        assert (
            0.98
            < draw(limits=limits, init="dense").values.detach().abs().max() * 200**0.5
            <= 1.0001
        )
    model = nn.Linear(20, 10)
    with pytest.raises(ValueError, match="init must be one of"):
        rewire.sparsify(model, density=0.5, init="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init='dense' is for select='random'"):
        rewire.sparsify(model, density=0.5, select="magnitude", init="dense")


def test_a_row_without_connections_is_no_trouble() -> None:
    layer = SparseLinear(30, 50, connections=5)
    assert layer.weight.values.isfinite().all()
    assert layer(torch.randn(3, 30)).isfinite().all()

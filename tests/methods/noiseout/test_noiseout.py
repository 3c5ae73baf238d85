"""NoiseOut: exact merges, correlations, noise outputs, and the threshold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewire.methods import NoiseOut
from rewire.methods.noiseout.correlation import measure
from rewire.nn.surgery import UnitGraph

pytest.importorskip("torch_pruning")

from dependent_units import dependent, method

ALWAYS: dict[str, Any] = {"required_score": -1.0, "at_once": 1}


def dependent_norm(norm: Any, u: int, v: int, scale: float, shift: float) -> None:
    """What a BatchNorm makes of two dependent channels is dependent: h_u = +-scale h_v + shift."""
    with torch.no_grad():
        norm.weight[u] = scale * norm.weight[v]
        norm.bias[u] = scale * norm.bias[v] + shift


def linear(alpha: float, beta: float) -> nn.Module:
    model = nn.Sequential(
        nn.Linear(6, 5), nn.Identity(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    )
    dependent(model[0], 1, 3, alpha, beta)
    return model


def relu(alpha: float, beta: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    dependent(model[0], 1, 3, abs(alpha), 0)  # ReLU keeps proportionality by a positive factor
    return model


def norm(alpha: float, beta: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model(torch.randn(64, 6))
    dependent(model[0], 1, 3, alpha, beta)
    model[1].running_mean[1] = alpha * model[1].running_mean[3] + beta
    model[1].running_var[1] = alpha**2 * model[1].running_var[3]
    model[1].eps = 0.0
    dependent_norm(model[1], 1, 3, 0.7, beta)
    return model


def conv(alpha: float, beta: float) -> nn.Module:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 4, 3),
        nn.Conv2d(4, 2, 3),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    dependent(model[1], 1, 3, alpha, beta)
    return model


def conv_norm_relu_pool_padded(alpha: float, beta: float) -> nn.Module:
    """A padded reader sees zeros at its borders, so dependence must be through the origin: it is,
    behind the ReLU.
    """
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 4, 3, bias=True),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 2, 3, padding=1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    model(torch.randn(64, 36))
    dependent(model[1], 1, 3, abs(alpha), beta)
    model[2].running_mean[1] = abs(alpha) * model[2].running_mean[3] + beta
    model[2].running_var[1] = alpha**2 * model[2].running_var[3]
    model[2].eps = 0.0
    dependent_norm(model[2], 1, 3, 0.7, 0.0)
    return model


def conv_flatten_biasless(alpha: float, beta: float) -> nn.Module:
    """Channels read by a Linear layer without bias behind a BatchNorm: the constant goes into its
    running mean.
    """
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 5, bias=False),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    dependent(model[1], 1, 3, alpha, beta)
    return model


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.body, self.head = kind(2, 5, batch_first=True), nn.Linear(5, 3)
        gates = self.body.weight_hh_l0.shape[0] // 5
        with torch.no_grad():  # unit 1 does what unit 3 does
            for p in (
                self.body.weight_ih_l0,
                self.body.weight_hh_l0,
                self.body.bias_ih_l0,
                self.body.bias_hh_l0,
            ):
                p.view(gates, 5, -1)[:, 1] = p.view(gates, 5, -1)[:, 3]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x.view(len(x), 3, 2))[0][:, -1])
        return out


class Residual(nn.Module):
    """A stream with several producers and readers: every reader has coefficients of its own."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = (
            nn.Linear(6, 4),
            nn.Linear(4, 5),
            nn.Linear(5, 4),
            nn.Linear(4, 3),
        )
        for layer in (self.stem, self.down):
            dependent(layer, 1, 3, alpha, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head(x + self.down(self.up(x).relu()))
        return out


EXACT: dict[str, tuple[Any, int, str]] = {
    "linear": (linear, 6, "0"),
    "relu": (relu, 6, "0"),
    "BatchNorm between": (norm, 6, "0"),
    "conv": (conv, 36, "1"),
    "conv, BatchNorm, ReLU, pool, padded conv": (conv_norm_relu_pool_padded, 36, "1"),
    "conv, flatten, no bias, BatchNorm behind": (conv_flatten_biasless, 36, "1"),
    "lstm": (lambda a, b: Recurrent(nn.LSTM), 6, "body"),
    "gru": (lambda a, b: Recurrent(nn.GRU), 6, "body"),
    "rnn": (lambda a, b: Recurrent(nn.RNN), 6, "body"),
    "residual": (lambda a, b: Residual(a), 6, "stem"),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.3), (-2.0, 1.0)])
def test_dependent_units_merge_without_a_trace(
    name: str, dtype: torch.dtype, alpha: float, beta: float
) -> None:
    build, features, layer = EXACT[name]
    torch.set_default_dtype(dtype)
    try:
        model = build(alpha, beta).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    x, new = torch.randn(200, features, dtype=dtype), torch.randn(50, features, dtype=dtype)
    merging = method(model, x, only=layer, **ALWAYS)
    expected = model(new)
    moments = measure(merging._graph, [layer], [x])[layer]
    found = moments.best("correlation")
    assert found is not None
    assert {found.unit, found.into} == {1, 3}
    assert found.correlation > 1 - 1e-6
    merging.end_epoch(lambda m: 0.0)
    assert merging.stats()["units"][layer] == UnitGraph(copy.deepcopy(model), x).count(layer)
    assert merging.stats()["merged"][layer] == 1
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(model(new), expected, rtol=tolerance, atol=tolerance)


@given(
    st.integers(0, 10_000),
    st.integers(2, 6),
    st.floats(0.1, 4.0),
    st.floats(-2, 2),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=25)
def test_any_dependent_pair_is_found_and_folded(
    seed: int, width: int, alpha: float, beta: float, negative: bool, damage: bool
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, width), nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, 2)
    ).double()
    u, v = torch.randperm(width)[:2].tolist()
    dependent(model[0], u, v, -alpha if negative else alpha, beta)
    x = torch.randn(40, 4, dtype=torch.float64)
    expected = model(x)
    made = method(model, x, only="0", criterion="damage" if damage else "correlation", **ALWAYS)
    made.end_epoch(lambda m: 0.0)
    assert model[0].out_features == width - 1
    torch.testing.assert_close(made.finalize()(x), expected, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 10_000), st.integers(1, 3))
@settings(max_examples=25)
def test_constant_units_go_first(seed: int, dead: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        for unit in range(dead):
            model[0].weight[unit] = 0
            model[0].bias[unit] = unit - 1.0  # dead, zero, and constant at 1
    x = torch.randn(40, 4, dtype=torch.float64)
    expected = model(x)
    made = method(model, x, required_score=-1.0, at_once=dead)
    made.end_epoch(lambda m: 0.0)
    assert model[0].out_features == 6 - dead
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_the_last_network_that_met_the_threshold_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(40, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    made = NoiseOut(
        model,
        optimizer,
        data=[x],
        targets="none",
        required_score=3.0,
        larger_is_better=False,
        seed=1,
    )

    def train() -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        made.step()

    def cost(m: nn.Module) -> float:
        assert not m.training
        assert not torch.is_grad_enabled()
        return 8.0 - m[0].out_features  # 0 at 8 units; 3 merges may be

    train()
    made.end_epoch(cost)
    assert model[0].out_features == 4  # the fourth broke the threshold and stays
    assert made.stats()["parameters_met"] == 6 * 5 + 5 + 5 * 3 + 3
    train()
    made.end_epoch(cost)  # not met: nothing is merged
    assert model[0].out_features == 4
    assert made.stats()["score"] == 4.0
    optimizer.param_groups[0]["lr"] = 0.5
    parameters = list(model.parameters())
    final = made.finalize()
    assert final[0].out_features == 5
    assert all(a is b for a, b in zip(parameters, final.parameters(), strict=True))
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in parameters)
    assert float(optimizer.state[parameters[0]]["step"]) == 1
    assert optimizer.param_groups[0]["lr"] == 0.5
    with torch.no_grad():
        assert final(x).shape == (40, 3)
    # These are those of the network that came back.
    assert (made.stats()["score"], made.stats()["merged"], made.updates) == (3.0, {"0": 3}, 3)
    assert made.finalize() is final  # and again: nothing more happens


@pytest.mark.parametrize("pace", [0.0, 0.9])
def test_a_merge_that_is_undone_leaves_no_trace(pace: float) -> None:
    """Undoing gives the bits of a run that was told to stop in time: network, optimizer, noise
    outputs, and counts.
    """

    def train(steps: int, **options: Any) -> tuple[nn.Module, Any, NoiseOut]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
        x = torch.randn(40, 6)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        made = NoiseOut(
            model,
            optimizer,
            data=[x],
            required_score=4.0,
            larger_is_better=False,
            seed=1,
            evaluate=lambda m: 9.0 - m[0].out_features,
            every=3,
            **options,
        )
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x).square().sum() + made.penalty()).backward()
            optimizer.step()
            made.step()
        return model, optimizer, made

    model, optimizer, made = train(4, overshoot="undo", pace=pace)  # a check, and a step behind it
    assert model[0].out_features == 5
    twin, other, told = train(4, at_once=4)
    assert {k: made.stats()[k] for k in ("units", "merged", "updates", "score")} == {
        k: told.stats()[k] for k in ("units", "merged", "updates", "score")
    }
    assert made._outputs is not None
    assert told._outputs is not None
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert torch.equal(value, other.state[b][name])
    for a, b in zip(
        made._outputs.layer.parameters(), told._outputs.layer.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(
            made._outputs.own.state[a]["exp_avg"], told._outputs.own.state[b]["exp_avg"]
        )
    assert torch.equal(made.finalize()[0].weight, told.finalize()[0].weight)


def test_what_one_layer_cannot_spare_others_may() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    seen: list[tuple[int, int]] = []

    def cost(m: nn.Module) -> float:
        units = (m[0].out_features, m[2].out_features)
        seen.append(units)
        return float(units[0] < 6 or units[1] < 3)

    made = method(
        model,
        torch.randn(40, 6),
        required_score=0.5,
        larger_is_better=False,
        overshoot="undo",
        criterion="damage",
    )
    made.end_epoch(cost)
    assert made.stats()["units"] == {"0": 6, "2": 3}
    assert made.stats()["merged"] == {"0": 2, "2": 5}
    assert made.stats()["score"] == 0.0
    assert {(5, n) for n in range(9)} & set(seen)  # both were tried beyond what they could spare
    assert {(n, 2) for n in range(9)} & set(seen)
    with torch.no_grad():
        assert model(torch.randn(4, 6)).shape == (4, 3)


def test_without_a_threshold_the_first_score_less_the_slack_is_it() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    made = method(model, torch.randn(40, 6), slack=0.25, at_once=2)
    made.end_epoch(lambda m: 0.75)
    assert made.stats()["required_score"] == 0.5
    assert model[0].out_features == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "uniform"}, "targets must be one of 'gaussian'"),
        ({"noise_outputs": 0}, "noise_outputs must be a whole number of at least 1"),
        ({"strength": -1.0}, "strength must be a finite number of at least 0|strength must be"),
        ({"targets": "binomial", "mean": 1.5}, "mean must be a finite number between 0 and 1"),
        ({"larger_is_better": "no"}, "larger_is_better must be True or False"),
        ({"criterion": "l1"}, "criterion must be"),
        ({"overshoot": "keep"}, "overshoot must be one of 'train', 'undo'"),
        ({"every": 0}, "every must be"),
        ({"every": 5}, "give evaluate="),
        ({"samples": 0}, "samples must be"),
        ({"pace": 2.0}, "pace must be"),
        ({"warmup": -1}, "warmup must be"),
        ({"only": "2"}, "the units of 2"),
        ({"only": "nothing*"}, "no layer 'nothing"),
        ({"data": None}, "give it data="),
        ({"data": []}, "data has no batch"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        NoiseOut(model, optimizer, **({"data": [torch.randn(3, 6)]} | options))


def test_what_cannot_be_merged_is_left_alone_or_refused_by_name() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normed, self.norm, self.free, self.head = (
                nn.Linear(6, 5),
                nn.LayerNorm(5),
                nn.Linear(5, 4),
                nn.Linear(4, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.free(self.norm(self.normed(x))).relu())
            return out

    x = torch.randn(20, 6)
    made = method(Mixed(), x, **ALWAYS)
    assert list(made.stats()["units"]) == ["free"]
    assert "norm is a LayerNorm" in made.stats()["refused"]["normed"]
    with pytest.raises(ValueError, match="norm is a LayerNorm"):
        method(Mixed(), x, only="normed")
    convolutional = nn.Sequential(nn.Conv1d(1, 4, 1), nn.ReLU(), nn.Conv1d(4, 2, 1))
    with pytest.raises(ValueError, match=r"this network ends with 2 \(Conv1d\)"):
        method(convolutional, torch.randn(4, 1, 5), targets="gaussian")


def test_a_check_without_a_score_is_an_error() -> None:
    made = method(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(20, 6))
    with pytest.raises(RuntimeError, match="give end_epoch"):
        made.end_epoch()

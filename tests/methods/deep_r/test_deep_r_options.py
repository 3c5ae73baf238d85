"""DEEP R's options: temperature tied to the rate, numbers per layer, Dale's law, dense moments, the
global samplers.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from harness import Run, linear
from rewire.methods import DeepR
from rewire.nn import SparseConv2d, SparseWeight, sparse_weights
from rewire.schedules import Exponential


def make(**parameters: Any) -> tuple[nn.Module, torch.optim.Optimizer, DeepR]:
    model = linear(torch.float64, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    return model, optimizer, DeepR(model, optimizer, **({"seed": 1} | parameters))


def still_step(optimizer: torch.optim.Optimizer, method: DeepR) -> None:
    """A step with a gradient of 0."""
    for pool in method.pools:
        pool.weight.values.grad = torch.zeros_like(pool.weight.values)
    optimizer.step()
    method.step()


# --- temperature and numbers per layer ------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.25, 0.05])
def test_tied_temperature_is_eta_alpha_squared_over_18_at_every_rate(lr: float) -> None:
    finals = []
    for parameters in ({"temperature": "tied"}, {"temperature": lr * 0.3**2 / 18}):
        model, optimizer, method = make(l1=0.3, **parameters)
        optimizer.param_groups[0]["lr"] = lr
        still_step(optimizer, method)
        finals.append(next(sparse_weights(model))[1].to_dense())
    torch.testing.assert_close(finals[0], finals[1])


def test_tied_temperature_follows_an_annealed_l1() -> None:
    finals = []
    for parameters in ({"temperature": "tied"}, {"noise": Exponential(0.1, 0.5)}):
        model, optimizer, method = make(l1=Exponential(0.3, 0.5), **parameters)
        for _ in range(3):
            still_step(optimizer, method)
        finals.append(next(sparse_weights(model))[1].to_dense())
    torch.testing.assert_close(finals[0], finals[1])


@pytest.mark.parametrize("l1", [[1.0, 2.0], {"0": 1.0, "2*": 2.0}, {"2.weight": 2.0, "*": 1.0}])
def test_each_layer_shrinks_by_its_own_l1(l1: Any) -> None:
    model, optimizer, method = make(l1=l1, noise=0.0)
    weights = [w for _, w in sparse_weights(model)]
    for weight in weights:
        with torch.no_grad():
            weight.values.copy_(10 * torch.sign(weight.values))
    still_step(optimizer, method)
    for weight, shrunk in zip(weights, (9.75, 9.5), strict=True):
        torch.testing.assert_close(
            weight.values.detach().abs(), torch.full_like(weight.values, shrunk)
        )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"l1": -1.0}, "l1 must be a finite number at least 0"),
        ({"l1": [1.0]}, r"a list of 1 for 2 sparse weights.*0\.weight, 2\.weight"),
        ({"l1": [1.0, math.inf]}, r"l1 of 2\.weight must be"),
        ({"l1": {"0": 1.0}}, r"says nothing of 2\.weight"),
        ({"l1": {"conv*": 1.0, "*": 1.0}}, r"no sparse weight fits 'conv\*'"),
        ({"temperature": -1e-3}, "temperature must be a finite number at least 0"),
        ({"temperature": "warm"}, "'tied'"),
        ({"temperature": "tied", "noise": 1.0}, "not both"),
        ({"noise": math.nan}, "noise must be"),
        ({"signs": "free"}, "signs must be one of"),
        ({"moments": "sparse"}, "moments must be one of"),
    ],
)
def test_refusals(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**parameters)


# --- Dale's law -----------------------------------------------------------------------------------


def test_what_leaves_a_neuron_has_one_sign() -> None:
    run = Run(("deep-r", {"l1": 1e-3, "noise": 0.2, "signs": "neuron"}))
    weight = next(iter(run.weights().values()))
    before = weight.to_dense().detach().clone()
    run.backward()
    moved = before - 0.5 * _dense_gradient(weight)
    run.optimizer.step()
    run.method.step()
    assert int((moved != 0).sum()) == 40
    seen: dict[str, torch.Tensor] = {}
    for _ in range(40):
        run.step()
        for name, w in run.weights().items():
            _rows, cols, values = w.coo()
            sign = torch.copysign(torch.ones(()), values.detach()).double()
            total = torch.zeros(w.matrix_shape[1], dtype=torch.float64).index_add(0, cols, sign)
            assert torch.equal(total.abs().long(), w.fan_out()), name
            known = seen.setdefault(name, torch.zeros_like(total))
            assert not ((known * total) < 0).any(), name  # it never changes
            known[total != 0] = torch.sign(total[total != 0])
    assert run.method.stats()["grown"]["0.weight"] > 40
    assert {-1.0, 1.0} <= set(seen["0.weight"].tolist())


def _dense_gradient(weight: SparseWeight) -> torch.Tensor:
    full = torch.zeros(weight.matrix_shape, dtype=weight.dtype)
    full[weight.rows.long(), weight.cols.long()] = weight.values.grad
    return full


def test_dales_law_keeps_magnitudes_at_its_first_step() -> None:
    model, optimizer, method = make(l1=0.0, noise=0.0, signs="neuron")
    weight = next(sparse_weights(model))[1]
    before = weight.to_dense().detach().clone()
    assert int((before < 0).sum()) > 5
    still_step(optimizer, method)
    assert torch.equal(weight.to_dense().abs(), before.abs())
    assert not torch.equal(weight.to_dense(), before)


def test_the_neuron_of_a_convolution_is_its_input_channel() -> None:
    layer = SparseConv2d(6, 8, 3, connections=200, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    method = DeepR(layer, optimizer, signs="neuron", l1=1e-2, noise=0.5, seed=4)
    for _ in range(20):
        layer.weight.values.grad = torch.zeros_like(layer.weight.values)
        optimizer.step()
        method.step()
    _, cols, values = layer.weight.coo()
    signs = [set(torch.sign(values[(cols // 9 == c) & (values != 0)]).tolist()) for c in range(6)]
    assert all(len(s) == 1 for s in signs)
    assert {-1.0, 1.0} <= set.union(*signs)
    assert method.stats()["grown"]["weight"] > 50


# --- moments of dormant connections ---------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
@pytest.mark.parametrize("scope", ["layer", "network"])
def test_dense_moments_are_those_of_a_dense_twin(optimizer: str, scope: str) -> None:
    """A dense twin of the network gets the gradient of every position, and updates its moments by
    the textbook.
    """
    parameters = {"l1": 1e-2, "noise": 0.2, "moments": "dense", "scope": scope}
    run = Run(("deep-r", parameters), optimizer=optimizer, dtype=torch.float64)
    twins = {
        name: torch.zeros(2, *w.shape, dtype=torch.float64) for name, w in run.weights().items()
    }
    for _ in range(25):
        dense = {name: w.to_dense().detach().requires_grad_() for name, w in run.weights().items()}
        g = torch.Generator().manual_seed(1000 + run.time)
        x, y = (
            torch.randn(8, 12, generator=g, dtype=torch.float64),
            torch.randint(0, 6, (8,), generator=g),
        )
        hidden = torch.relu(x @ dense["0.weight"].t() + run.model[0].bias.detach())
        nn.functional.cross_entropy(hidden @ dense["2.weight"].t(), y).backward()
        run.step()
        for name, weight in run.weights().items():
            gradient, state = dense[name].grad, run.optimizer.state[weight.values]
            assert gradient is not None
            if optimizer == "momentum":
                twins[name][0] = 0.9 * twins[name][0] + gradient
                keys = {"momentum_buffer": twins[name][0]}
            else:
                twins[name][0] = 0.9 * twins[name][0] + 0.1 * gradient
                twins[name][1] = 0.999 * twins[name][1] + 0.001 * gradient**2
                keys = {"exp_avg": twins[name][0], "exp_avg_sq": twins[name][1]}
            active = weight.rows >= 0
            at = weight.rows[active].long(), weight.cols[active].long()
            for key, expected in keys.items():
                torch.testing.assert_close(state[key][active], expected[at], atol=1e-9, rtol=1e-7)
    assert sum(run.method.stats()["grown"].values()) > 50


def test_dense_moments_refuse_optimizers_they_do_not_know() -> None:
    model = linear(torch.float32, 1)
    for optimizer in (
        torch.optim.RMSprop(model.parameters()),
        torch.optim.Adam(model.parameters(), amsgrad=True),
    ):
        with pytest.raises(ValueError, match="moments='dense' knows"):
            DeepR(model, optimizer, moments="dense")


def test_plain_sgd_has_no_moments_to_keep() -> None:
    _model, optimizer, method = make(moments="dense")
    still_step(optimizer, method)  # without a backward pass: nothing is captured, nothing is missed
    assert all(pool.weight.capture is None for pool in method.pools)


# --- the global budget ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allotment", "expected"), [("uniform", 400 * 2000 / 3000), ("authors", 200.0)]
)
def test_global_samplers_have_the_laws_they_should(allotment: Any, expected: float) -> None:
    """Where the loss is flat, P(S) is proportional to the product of the weights with which
    connections are drawn.

    Uniform over all dormant connections: every support alike, so the share of a layer is
    hypergeometric, its mean K M_l / M. The authors draw the layer first, in proportion to its
    initial budget, then a dormant connection of it; a support with a connections in one layer and b
    in the other then has weight p^a q^b (M_1 - a)! (M_2 - b)!, and summing over the supports with a
    and b gives the binomial of K and p, whatever the layers' sizes.
    """
    first = SparseWeight((20, 100), 200, capacity=400, generator=torch.Generator().manual_seed(0))
    second = SparseWeight((10, 100), 200, capacity=400, generator=torch.Generator().manual_seed(1))
    model = nn.ModuleList([first, second])
    for weight in (first, second):
        nn.init.uniform_(weight.values, -0.3, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3)
    method = DeepR(
        model, optimizer, l1=1.0, temperature=0.2, scope="network", allotment=allotment, seed=2
    )
    seen = []
    for step in range(3_000):
        still_step(optimizer, method)
        assert first.connections + second.connections == 400
        if step >= 1_000:
            seen.append(first.connections)
    assert sum(seen) / len(seen) == pytest.approx(expected, abs=15)  # three standard errors

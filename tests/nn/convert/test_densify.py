"""Back from pools to dense parameters in mid-training: the optimizers go on as those of a dense
model would.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer

import rewire
from masked import MODELS, OPTIMIZERS, made, masks_of, train
from rewire.nn import follow_optimizer, sparse_weights, to_sparse
from rewire.nn.convert.cut import dense_weights
from wrappers import OPTIMIZERS as WRAPPERS
from wrappers import Lookahead, Wrapper


def pair(name: str, optimizer: str) -> list[tuple[nn.Module, Optimizer]]:
    """A dense model trained under masks, and its twin, cut to them after 2 of 5 steps."""
    kind, options = OPTIMIZERS[optimizer]
    runs: list[tuple[nn.Module, Optimizer]] = []
    for sparse in (False, True):
        model = made(name)
        o: Optimizer = getattr(optim, kind)(model.named_parameters(), **options)
        masks = masks_of(model)
        with torch.no_grad():  # else weight decay would put what is outside into the momentum
            for name_of, _, _, weight in dense_weights(model):
                weight.mul_(masks[name_of])
        train(model, o, range(2), masks)
        if sparse:
            model = to_sparse(model, masks, o)
        train(model, o, range(2, 5), None if sparse else masks)
        runs.append((model, o))
    return runs


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["linear", "attention"])
def test_training_goes_on_as_that_of_a_dense_model(name: str, optimizer: str) -> None:
    (twin, other), (model, mine) = pair(name, optimizer)
    back = rewire.densify(model, mine)
    assert not list(sparse_weights(back))
    train(twin, other, range(5, 8))
    train(back, mine, range(5, 8))
    expected = dict(twin.named_parameters())
    found = dict(back.named_parameters())
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-11, msg=key)
    names = [n for g in mine.param_groups for n in g["param_names"]]
    by_name = dict(zip(names, (p for g in mine.param_groups for p in g["params"]), strict=True))
    assert {n: id(p) for n, p in found.items()} == {n: id(p) for n, p in by_name.items()}


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("linear", "attention")])
def test_every_kind_of_layer_goes_back(name: str) -> None:
    test_training_goes_on_as_that_of_a_dense_model(name, "adam")


def test_gradients_and_biases_stay() -> None:
    layer = rewire.nn.SparseLinear(6, 5, connections=10)
    model, bias, weight = nn.Sequential(layer), layer.bias, layer.weight
    optimizer = optim.SGD(model.parameters(), 0.1)
    model(torch.randn(3, 6)).square().mean().backward()
    expected = torch.zeros(5, 6)
    assert weight.values.grad is not None
    expected[weight.rows.long(), weight.cols.long()] = weight.values.grad
    rewire.densify(model, optimizer)
    assert model.get_parameter("0.bias") is bias
    found = model.get_parameter("0.weight").grad
    assert found is not None
    assert torch.equal(found, expected)


def test_adafactor_goes_on_with_the_factors_of_its_estimate() -> None:
    layer = rewire.nn.SparseLinear(6, 5, density=1.0)
    model, weight = nn.Sequential(layer), layer.weight
    optimizer = optim.Adafactor(model.parameters())
    x = torch.randn(3, 6)
    model(x).square().mean().backward()
    optimizer.step()
    variance = torch.zeros(5, 6)
    variance[weight.rows.long(), weight.cols.long()] = optimizer.state[weight.values]["variance"]
    rewire.densify(model, optimizer)
    state = optimizer.state[model.get_parameter("0.weight")]
    torch.testing.assert_close(state["row_var"], variance.mean(1, keepdim=True))
    torch.testing.assert_close(state["col_var"], variance.mean(0, keepdim=True))
    model(x).square().mean().backward()
    optimizer.step()


def test_shared_pools_stay_shared() -> None:
    layers = [rewire.nn.SparseLinear(6, 6, connections=12) for _ in range(2)]
    layers[1].weight = layers[0].weight
    model = nn.Sequential(*layers)
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(3, 6)).square().mean().backward()
    optimizer.step()
    momentum = optimizer.state[layers[0].weight.values]["momentum_buffer"]
    expected = torch.zeros(6, 6)
    expected[layers[0].weight.rows.long(), layers[0].weight.cols.long()] = momentum
    rewire.densify(model, optimizer)
    dense = model.get_parameter("0.weight")
    assert model.get_parameter("1.weight") is dense
    assert torch.equal(optimizer.state[dense]["momentum_buffer"], expected)
    assert sum(p is dense for g in optimizer.param_groups for p in g["params"]) == 1


class Odd(optim.SGD):
    """Keeps something beside its state, and an odd shape in it."""

    def __init__(self, params: Any, *, beside: bool) -> None:
        super().__init__(params, 0.1)
        if beside:
            self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        else:
            for g in self.param_groups:
                for p in g["params"]:
                    self.state[p]["pairs"] = torch.zeros(p.numel(), 2)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("method", r"a method still rewires 0.weight: call its finalize\(\)"),
        ("follower", r"SGD trains 0.weight and would train nothing afterwards: give it to densify"),
        ("beside", "Odd keeps slow of 0.weight beside optimizer.state"),
        ("shape", r"Odd keeps pairs of shape \(12, 2\)"),
        ("groups", "0.in_proj_weight is made of 3 pools, and SGD has 1 of them"),
        ("no optimizer", "an optimizer must be a torch.optim.Optimizer, not a dict"),
    ],
)
def test_what_cannot_go_back_is_refused_and_nothing_changes(case: str, message: str) -> None:
    attention = case == "groups"
    layer = (
        rewire.nn.SparseMultiheadAttention(4, 2, connections=30)
        if attention
        else rewire.nn.SparseLinear(6, 5, connections=12)
    )
    model = nn.Sequential(layer)
    held: list[Any] = []
    optimizers: Any = optim.SGD(model.parameters(), 0.1)
    if case == "method":
        held.append(rewire.methods.SET(model, optimizers))
    elif case == "follower":
        follow_optimizer(optimizers, [w for _, w in sparse_weights(model)])
        held.append(optimizers)
        optimizers = ()
    elif case == "groups":
        alone = model.get_parameter("0.k_proj_weight.values")
        rest = [p for p in model.parameters() if p is not alone]
        optimizers = optim.SGD([{"params": [alone]}, {"params": rest}], 0.1)
    elif case == "no optimizer":
        optimizers = [{}]
    else:
        optimizers = Odd(model.parameters(), beside=case == "beside")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        rewire.densify(model, optimizers)
    assert model[0] is layer
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    if case == "method":  # a copy has no method, and a finished one lets go
        rewire.densify(copy.deepcopy(model))
        held[0].finalize()
        rewire.densify(model)


@pytest.mark.parametrize("wrapper", ["lookahead", "lookahead-inside", "wrapper-of-lookahead"])
def test_slow_weights_become_dense_along(wrapper: str) -> None:
    """Where there is no connection they are what the weight is, and training goes on as that of a
    masked dense model.
    """
    make: Callable[[Any], Optimizer] = (
        (lambda p: Wrapper(Lookahead(optim.SGD(p, 0.1, momentum=0.9))))
        if wrapper == "wrapper-of-lookahead"
        else WRAPPERS[wrapper]
    )
    model = rewire.sparsify(made("linear"), density=0.4)
    twin = rewire.densify(copy.deepcopy(model))
    masks = {name: weight != 0 for name, _, _, weight in dense_weights(twin)}
    mine, other = make(model.parameters()), make(twin.parameters())
    train(model, mine, range(3))
    train(twin, other, range(3), masks)
    back = rewire.densify(model, mine)
    train(back, mine, range(3, 8))
    train(twin, other, range(3, 8))
    expected = dict(twin.named_parameters())
    for key, value in back.named_parameters():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("wrapper", ["nested", "flat", "dict", "groups"])
def test_slow_weights_beside_the_state_are_refused(wrapper: str) -> None:
    model = rewire.sparsify(made("linear"), density=0.4)
    optimizer = WRAPPERS[f"lookahead-{wrapper}"](model.parameters())
    train(model, optimizer, range(3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"Lookahead\w+ keeps .* of 0.weight beside optimizer.state"
    ):
        rewire.densify(model, optimizer)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    train(model, optimizer, range(3, 5))  # and all goes on as it was

"""sparsify, densify, param_groups, summary, sparse_weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import rewire
from rewire import budget
from rewire.nn import SparseLinear, SparseWeight, densify, param_groups, sparse_weights, sparsify
from rewire.nn.inspect.summary import summary


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(x + self.inner(x))
        return result


def make() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), Residual(), Residual(), nn.Linear(16, 4, bias=False)
    )


NAMES = ["0", "2.inner.0", "2.inner.2", "3.inner.0", "3.inner.2", "4"]


def layers(model: nn.Module) -> dict[str, SparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}


def unchanged(model: nn.Module, before: nn.Module) -> bool:
    mine, theirs = model.state_dict(), before.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("distribution", ["erk", "er", "uniform"])
def test_a_nested_model_meets_its_budget_exactly(distribution: str) -> None:
    model = make()
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
    assert sparsify(model, density=0.1, distribution=distribution) is model
    found = layers(model)
    assert list(found) == NAMES
    total = round(0.1 * sum(math.prod(s) for s in shapes))
    expected = budget.distribute(distribution, shapes, total)
    assert [layer.weight.connections for layer in found.values()] == expected
    assert summary(model).connections == total
    assert found["4"].bias is None
    for name, value in biases.items():
        assert torch.equal(model.get_parameter(name), value)
    model(torch.randn(3, 8)).sum().backward()


def test_a_number_of_connections_and_a_generator() -> None:
    a, b = make(), make()
    for m in (a, b):
        sparsify(m, connections=500, generator=torch.Generator().manual_seed(3))
    assert sum(w.connections for _, w in sparse_weights(a)) == 500
    assert [w.fingerprint() for _, w in sparse_weights(a)] == [
        w.fingerprint() for _, w in sparse_weights(b)
    ]


@pytest.mark.parametrize(
    ("only", "exclude", "expected"),
    [
        ("2.*", None, ["2.inner.0", "2.inner.2"]),
        (["0", "4"], None, ["0", "4"]),
        (None, "*.inner.*", ["0", "4"]),
        (None, ["0", "3.*"], ["2.inner.0", "2.inner.2", "4"]),
        ("*.inner.*", "3.*", ["2.inner.0", "2.inner.2"]),
    ],
)
def test_only_and_exclude(only: Any, exclude: Any, expected: list[str]) -> None:
    model = sparsify(make(), density=0.2, only=only, exclude=exclude)
    assert list(layers(model)) == expected


def test_a_dict_of_budgets() -> None:
    model = sparsify(make(), density={"2.inner.0": 0.5, "*.inner.*": 0.25})
    assert {n: m.weight.connections for n, m in layers(model).items()} == {
        "2.inner.0": 256,
        "2.inner.2": 128,
        "3.inner.0": 128,
        "3.inner.2": 128,
    }
    model = sparsify(make(), connections={"0": 7, "4": 64})
    assert {n: m.weight.connections for n, m in layers(model).items()} == {"0": 7, "4": 64}


def test_magnitude_keeps_the_largest_and_their_values() -> None:
    model = make()
    before = copy.deepcopy(model)
    sparsify(model, density=0.3, distribution="uniform", select="magnitude")
    for name, layer in layers(model).items():
        dense = before.get_submodule(name).weight.detach()
        threshold = dense.abs().flatten().sort(descending=True).values[layer.weight.connections - 1]
        assert torch.equal(
            layer.weight.to_dense(), torch.where(dense.abs() >= threshold, dense, torch.zeros(()))
        )
    assert torch.equal(
        sparsify(copy.deepcopy(before), density=1.0, select="magnitude")(torch.ones(2, 8)).round(
            decimals=4
        ),
        before(torch.ones(2, 8)).round(decimals=4),
    )


def test_densify_gives_the_same_outputs() -> None:
    model = sparsify(make(), density=0.2).eval()
    x = torch.randn(5, 8)
    y = model(x)
    dense = densify(copy.deepcopy(model))
    assert not layers(dense)
    assert all(type(dense.get_submodule(n)) is nn.Linear for n in NAMES)
    assert not any(m.training for m in dense.modules())
    torch.testing.assert_close(dense(x), y)
    for name, layer in layers(model).items():
        assert torch.equal(dense.get_submodule(name).weight, layer.weight.to_dense())
    again = sparsify(
        dense,
        connections={n: m.weight.connections for n, m in layers(model).items()},
        select="magnitude",
    )
    assert all(
        torch.equal(m.weight.to_dense(), layers(model)[n].weight.to_dense())
        for n, m in layers(again).items()
    )


def test_dtype_mode_and_frozen_layers_stay_so() -> None:
    model = make().double().eval()
    model[0].requires_grad_(False)
    model[4].weight.requires_grad_(False)
    sparsify(model, density=0.5)
    for m in (model, densify(copy.deepcopy(model))):
        assert not any(p.requires_grad for i in (0, 4) for p in m[i].parameters())
        assert all(p.requires_grad for p in m[2].parameters())
        assert all(p.dtype == torch.float64 for p in m.parameters())
        assert not any(c.training for c in m.modules())


def test_a_single_layer_is_returned() -> None:
    layer = nn.Linear(8, 4)
    sparse = sparsify(layer, density=0.5)
    assert isinstance(sparse, SparseLinear)
    assert type(densify(sparse)) is nn.Linear


def test_a_module_under_two_names_stays_one() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(8, 2)})
    sparsify(model, density=0.5)
    assert model["a"] is model["b"][0]
    assert [n for n, _ in sparse_weights(model)] == ["a.weight", "c.weight"]
    densify(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is nn.Linear


def tied(other: str) -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "e": nn.Embedding(8, 8)})
    model["b"].weight = model[other].weight
    return model


@pytest.mark.parametrize("other", ["a", "e"])
@pytest.mark.parametrize(
    "arguments", [{"density": 0.5}, {"density": 0.5, "only": "b"}, {"density": {"b": 0.5}}]
)
def test_tied_weights_are_refused(other: str, arguments: dict[str, Any]) -> None:
    model = tied(other)
    with pytest.raises(ValueError, match=r"shares its weight with .* untie them first"):
        sparsify(model, **arguments)
    assert model["b"].weight is model[other].weight
    if other == "e":
        sparsify(model, density=0.5, exclude="b")


def test_subclasses_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(8, 8), nn.Linear(8, 8))
    sparsify(model, density=0.5)
    assert list(layers(model)) == ["1"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of density= and connections="),
    ({"density": 0.5, "connections": 3}, "exactly one of"),
    ({"density": 0.0}, "density must be above 0"),
    ({"density": 1.01}, "density must be above 0"),
    ({"density": math.nan}, "density must be above 0"),
    ({"density": 1e-9}, "without any: use at least"),
    ({"density": 0.002}, "cannot be spread over 6 weights"),
    ({"connections": 5}, "cannot be spread over 6 weights"),
    ({"connections": 0}, "can have between 1 and"),
    ({"connections": 10**9}, "can have between 1 and"),
    ({"connections": 2.5}, "can have between 1 and"),
    ({"connections": math.inf}, "can have between 1 and"),
    ({"connections": {"0": 129}}, "0 can have between 1 and 128 connections, not 129"),
    ({"connections": {"0": 5, "4": 0}}, "4 can have between 1 and 64 connections, not 0"),
    ({"density": {"0": 0.5, "4": 2.0}}, "density must be above 0"),
    (
        {"density": {"0": 0.5, "nothing": 0.1}},
        "pattern 'nothing' matches no layer; there are 0, 2.inner.0",
    ),
    ({"density": 0.5, "distribution": "earth"}, "unknown distribution 'earth'"),
    ({"density": 0.5, "only": "nothing"}, "no layer to convert"),
    ({"density": 0.5, "exclude": "*"}, "no layer to convert"),
    ({"density": 0.5, "select": "best"}, "select must be 'random' or 'magnitude'"),
    ({"density": {}}, "no layer to convert"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_errors_leave_the_model_unchanged(arguments: dict[str, Any], message: str) -> None:
    model = make()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        sparsify(model, **arguments)
    assert unchanged(model, before)


def test_transformer_encoders_in_evaluation() -> None:
    """Their fused path would read weights past the layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    sparsify(model, density=0.5)
    x, mask = (
        torch.randn(3, 5, 8),
        torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5]),
    )
    expected = model(x, src_key_padding_mask=mask)
    model.eval()
    with torch.no_grad():
        y = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(y[~mask], expected[~mask])


# --- the rest -------------------------------------------------------------------------------------


def test_param_groups_decay_weights_only() -> None:
    model = nn.Sequential(
        SparseLinear(8, 16, density=0.5), nn.LayerNorm(16), nn.Linear(16, 4), nn.Conv1d(1, 2, 3)
    )
    model[3].requires_grad_(False)
    decayed, plain = param_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    ids = {n: id(p) for n, p in model.named_parameters()}
    assert {id(p) for p in decayed["params"]} == {ids["0.weight.values"], ids["2.weight"]}
    assert {id(p) for p in plain["params"]} == {
        ids[n] for n in ("0.bias", "1.weight", "1.bias", "2.bias")
    }
    torch.optim.AdamW([decayed, plain])


def test_sparse_weights_lists_shared_pools_once() -> None:
    weight = SparseWeight((8, 8), 20)
    model = nn.Sequential(
        SparseLinear.from_weight(weight), nn.Sequential(SparseLinear.from_weight(weight))
    )
    assert [(n, w is weight) for n, w in sparse_weights(model)] == [("0.weight", True)]
    assert [(n, w is weight) for n, w in sparse_weights(weight)] == [("", True)]
    x = torch.randn(3, 8)
    model(x).sum().backward()  # both uses reach the one gradient
    assert weight.values.grad is not None
    densify(model)
    assert model[0].weight is model[1][0].weight


def test_from_weight_checks() -> None:
    with pytest.raises(ValueError, match="needs a 2-D weight"):
        SparseLinear.from_weight(SparseWeight((4, 3, 3), 5))
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\)"):
        SparseLinear.from_weight(SparseWeight((4, 3), 5), torch.zeros(3))


def test_summary() -> None:
    model = nn.Sequential(
        SparseLinear(8, 16, connections=32, capacity=40),
        nn.ReLU(),
        SparseLinear(16, 4, density=1.0),
    )
    s = rewire.summary(model)
    first, second = s.weights
    assert (first.name, first.shape, first.connections, first.capacity) == (
        "0.weight",
        (16, 8),
        32,
        40,
    )
    dense = model[0].weight.to_dense() != 0
    for degrees, axis in ((first.fan_in, 1), (first.fan_out, 0)):
        count = dense.sum(axis)
        assert degrees == (
            int(count.min()),
            pytest.approx(float(count.double().mean())),
            int(count.max()),
        )
    assert second.density == 1.0
    assert second.fan_in == (16, 16.0, 16)
    assert (s.connections, s.dense_parameters) == (96, 16 + 4)
    assert s.density == 96 / (128 + 64)
    # values 4 bytes; rows, cols and four lists 4 bytes a slot; two pointers
    assert first.bytes == 40 * 4 * 7 + (17 + 9) * 4
    assert s.bytes == first.bytes + second.bytes
    text = str(s)
    assert "0.weight" in text
    assert "16 x 8" in text
    assert "25.0000%" in text
    assert "total" in text
    assert len({len(line) for line in text.splitlines() if set(line) == {"-"}}) == 1


def test_summary_of_a_dense_model() -> None:
    s = summary(nn.Linear(3, 4))
    assert (s.connections, s.density, s.bytes, s.dense_parameters) == (0, 0.0, 0, 16)
    assert "total" in str(s)

"""Removing units: the network computes what it computed with their columns at zero, and the
optimizer follows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import rewire
from rewire.nn.surgery import UnitGraph, fit_shapes, load_resized, remove_units


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.PReLU(6),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 7),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )


def separable() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)),
        nn.Conv2d(2, 6, 1),
        nn.InstanceNorm2d(6, affine=True),
        nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.Flatten(),
        nn.Linear(180, 3),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(6, 4), nn.Linear(4, 7), nn.Linear(7, 4)
        self.gate, self.head = nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = x + self.down(self.up(x).relu())
        out: Tensor = self.head(torch.cat([y * self.gate(y).sigmoid(), x], 1))
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: type[Any] = nn.LSTM, use: str = "last", **options: Any) -> None:
        super().__init__()
        self.embed, self.body = nn.Linear(2, 4), kind(4, 6, batch_first=True, **options)
        self.head, self.use = nn.Linear(6, 3), use

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.body(self.embed(x.view(len(x), 3, -1)))
        h, c = state if isinstance(state, tuple) else (state, state)
        used: Tensor = self.head(
            {"last": out[:, -1], "sum": out.sum(1), "h": h[0], "c": c[0]}[self.use]
        )
        return used


#: name: (model, features of the input, layers that can be cut)
MODELS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "mlp": (mlp, 6, ["0", "2"]),
    "conv": (conv, 36, ["1", "4", "8"]),
    "separable": (separable, 32, ["1", "5", "7"]),
    "residual": (Residual, 6, ["stem", "up", "down", "gate"]),
    "lstm": (Recurrent, 6, ["embed", "body"]),
    "lstm-sum": (lambda: Recurrent(use="sum"), 6, ["embed", "body"]),
    "gru": (lambda: Recurrent(nn.GRU, "h"), 6, ["embed", "body"]),
    "rnn": (lambda: Recurrent(nn.RNN, "sum", bias=False), 6, ["embed", "body"]),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}

all_models = pytest.mark.parametrize("name", MODELS)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, features: int, steps: int = 3
) -> None:
    model.train()
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(8, features, generator=g), torch.randint(0, 3, (8,), generator=g)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x), y)
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)  # type: ignore[arg-type]
    model.eval()


def silence(model: nn.Module, graph: UnitGraph, name: str, units: list[int]) -> None:
    """Zero the columns of all that reads the units, found by hand: through a hook on what the
    consumers see.
    """
    group = graph.group(name)
    for site in [*group.consumers, *group.producers]:
        module: Any = model.get_submodule(site.name)
        at = site.positions[torch.isin(site.units, torch.tensor(units))]
        with torch.no_grad():
            if site in group.producers:
                if isinstance(module, nn.RNN | nn.LSTM | nn.GRU):
                    module.weight_hh_l0[:, at] = 0
            elif isinstance(module, nn.RNN | nn.LSTM | nn.GRU):
                module.weight_ih_l0[:, at] = 0
            else:
                module.weight[
                    at if isinstance(module, nn.ConvTranspose2d) else (slice(None), at)
                ] = 0


@all_models
def test_layers_that_can_be_cut(name: str) -> None:
    build, features, layers = MODELS[name]
    graph = UnitGraph(build(), torch.randn(2, features))
    assert [n for n in graph.names if graph.refusal(n) is None] == layers


@all_models
def test_outputs_are_those_with_zeroed_columns(name: str) -> None:
    build, features, layers = MODELS[name]
    x = torch.randn(5, features)
    for layer in layers:
        model = build()
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), features)
        reference = copy.deepcopy(model)
        graph = UnitGraph(model, x)
        silence(reference, graph, layer, [0, 3])
        before = graph.count(layer)
        graph.remove({layer: [3, 0]})
        assert graph.count(layer) == before - 2
        torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-6)


@given(st.data())
@settings(max_examples=25)
def test_many_cuts_one_graph(data: st.DataObject) -> None:
    """Any sequence of cuts through one graph does what a new graph would each time."""
    name = data.draw(st.sampled_from(sorted(MODELS)))
    build, features, layers = MODELS[name]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(3, features)
    one = build().eval()
    fresh = copy.deepcopy(one)
    graph = UnitGraph(one, x)
    for _ in range(data.draw(st.integers(1, 4))):
        layer = data.draw(st.sampled_from(layers))
        count = graph.count(layer)
        if count <= 2:
            continue
        units = data.draw(
            st.lists(st.integers(0, count - 1), min_size=1, max_size=count - 2, unique=True)
        )
        graph.remove({layer: units})
        remove_units(fresh, {layer: units}, x)
    assert one.state_dict().keys() == fresh.state_dict().keys()
    for a, b in zip(one.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one(x), fresh(x))
    assert repr(one) == repr(fresh)  # in_features and the like


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "conv", "lstm", "residual"])
def test_the_optimizer_follows(name: str, optimizer: str) -> None:
    build, features, layers = MODELS[name]
    model = build()
    trainer = OPTIMIZERS[optimizer](model.parameters())
    train(model, trainer, features)
    parameters = list(model.parameters())
    old = {
        p: {k: v.clone() for k, v in trainer.state[p].items() if isinstance(v, Tensor)}
        for p in parameters
    }
    grads = {p: p.grad.clone() for p in parameters if p.grad is not None}
    UnitGraph(model, torch.randn(2, features)).remove({layers[0]: [1], layers[1]: [0, 2]}, trainer)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [p for g in trainer.param_groups for p in g["params"]] == parameters
    for p in parameters:
        assert p.grad is not None
        assert p.grad.shape == p.shape
        keeps = [keep_of(n, m, p.dim()) for n, m in zip(grads[p].shape, p.shape, strict=True)]
        assert len(keeps) == p.dim()
        for key, value in trainer.state[p].items():
            if (
                isinstance(value, Tensor)
                and old[p][key].shape == grads[p].shape
                and optimizer != "lbfgs"
            ):
                assert value.shape == p.shape
                # Every number that is left was there, in the same order of size.
                assert set(value.flatten().tolist()) <= set(old[p][key].flatten().tolist())
            elif isinstance(value, Tensor) and value.dim() == 0:
                assert torch.equal(value, old[p][key])
    before = [p.detach().clone() for p in parameters]
    train(model, trainer, features)
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def keep_of(before: int, after: int, dims: int) -> int:
    assert 0 < after <= before
    return dims


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adafactor"])
def test_state_is_cut_with_the_same_indices(optimizer: str) -> None:
    """The parameter itself, copied into the state before, must be cut as the parameter is."""
    model = mlp()
    trainer = OPTIMIZERS[optimizer](model.parameters())
    train(model, trainer, 6)
    for p in model.parameters():
        for key, value in trainer.state[p].items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                trainer.state[p][key] = p.detach().clone()
            elif isinstance(value, Tensor) and value.dim() == p.dim():
                rows = value.shape[0] > 1
                trainer.state[p][key] = (
                    p.detach()[:, :1].clone() if rows else p.detach()[:1].clone()
                )
    graph = UnitGraph(model, torch.randn(2, 6))
    graph.remove({"0": [1, 2], "2": [4]}, trainer)
    compared = 0
    for p in model.parameters():
        for value in trainer.state[p].values():
            if isinstance(value, Tensor) and value.dim() == p.dim():
                assert torch.equal(value, p.detach()[tuple(slice(n) for n in value.shape)])
                compared += 1
    assert compared >= 6


def test_a_backward_through_an_old_forward_raises() -> None:
    model = mlp()
    x = torch.randn(2, 6)
    loss = model(x).sum()
    remove_units(model, {"0": [1]}, x)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


class Calls(nn.Module):
    """Networks in which a cut goes wrong where nobody looks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.p, self.kind = nn.Parameter(torch.ones(8)), kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.kind == "parameter":
            x = x * self.p
        elif self.kind == "functional":
            x = nn.functional.linear(x, self.b.weight)
        elif self.kind == "view":
            x = x.view(-1, 2, 4).flatten(1)
        elif self.kind == "softmax":
            x = x.softmax(1)
        elif self.kind == "roll":
            x = x.roll(1, 1)
        out: Tensor = self.c(x)
        return out


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[2].weight = model[0].weight
    return model


def twice() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(8, 3))


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    "shared": (tied, (8,), "0", r"0\.weight is shared"),
    "grouped": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1, groups=2)),
        (2, 3),
        "0",
        "1 .*groups=2",
    ),
    "layernorm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
        (4,),
        "0",
        "1 is a Layer",
    ),
    "groupnorm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4)),
        (2, 3),
        "0",
        "1 is a GroupNorm",
    ),
    "sparse": (
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), rewire.nn.SparseLinear(6, 2, density=0.5)
        ),
        (4,),
        "0",
        "1|2 is a sparse layer",
    ),
    "parametrized": (
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))
        ),
        (4,),
        "0",
        "1 is parametrized",
    ),
    "masked": (
        lambda: nn.Sequential(prune.identity(nn.Linear(4, 6), "weight"), nn.Linear(6, 2)),
        (4,),
        "0",
        "0 has a weight that is computed",
    ),
    "output": (mlp, (6,), "4", "the units of 4 .*shape of the network's output"),
    "no layer": (mlp, (6,), "7", "no layer '7'"),
    "relu": (mlp, (6,), "1", "1 is a ReLU"),
    "two-layer lstm": (lambda: Recurrent(num_layers=2), (6,), "body", "body .*several layers"),
    "lstm with projection": (
        lambda: nn.Sequential(nn.LSTM(4, 6, proj_size=3)),
        (3, 4),
        "0",
        "proj_size",
    ),
    "cell state used": (lambda: Recurrent(use="c"), (6,), "body", "body"),
    "parameter": (lambda: Calls("parameter"), (6,), "a", r"units of a meet p"),
    "functional": (lambda: Calls("functional"), (6,), "a", "units of a"),
    "view": (lambda: Calls("view"), (6,), "a", "units of a .*does not run"),
    "softmax": (lambda: Calls("softmax"), (6,), "a", "units of a .*mixes them"),
    "roll": (lambda: Calls("roll"), (6,), "a", "units of a .*mixes them"),
    "twice": (twice, (8,), "0", "units of 0 .*called more than once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_anything_changed(name: str) -> None:
    build, shape, layer, message = REFUSED[name]
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mode = model.training
    with pytest.raises(ValueError, match=message):
        remove_units(model, {layer: [0]}, torch.randn(2, *shape))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert model.training == mode


def test_a_bad_cut_changes_nothing() -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = UnitGraph(model, torch.randn(2, 6))
    for cuts, message in [
        ({"0": [0], "2": [5]}, "2 has units 0 to 4"),
        ({"0": range(8)}, "at least 1 must stay"),
        ({"2": [0], "4": [0]}, "units of 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            graph.remove(cuts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["preconditioner"] = torch.eye(48)
    with pytest.raises(ValueError, match=r"'preconditioner' of 0\.weight"):
        graph.remove({"0": [0]}, optimizer)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@all_models
def test_a_cut_network_is_saved_and_loaded(name: str) -> None:
    build, features, layers = MODELS[name]
    x = torch.randn(2, features)
    model, other = build().eval(), build().eval()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    whole = copy.deepcopy(other.state_dict())
    remove_units(model, {layer: [0] for layer in layers if layer not in ("down", "gate")}, x)
    load_resized(other, model.state_dict())
    assert torch.equal(model(x), other(x))
    assert repr(model) == repr(other)
    train(other, optimizer, features)
    load_resized(other, whole)  # and back to the larger one
    assert repr(other) == repr(build())
    with pytest.raises(ValueError, match="another model"):
        load_resized(other, {})
    with pytest.raises(ValueError, match="dimensions"):
        fit_shapes(other, {next(iter(dict(other.named_parameters()))): (1, 1, 1, 1, 1, 1)})


def test_without_torch_pruning_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"rewire\[prune\]"):
        UnitGraph(mlp(), torch.randn(2, 6))

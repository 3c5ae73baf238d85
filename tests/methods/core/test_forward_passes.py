"""Which forward passes methods count, and that they see layers however these are called."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import rewire
from rewire.methods import NoiseOut
from rewire.methods.criteria.activations import Recorder

pytest.importorskip("torch_pruning")

X = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """A body that may be checkpointed, and a head."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()).tanh()
        out: Tensor = (
            self.head(h)
            if self.reentrant is None
            else checkpoint(self.head, h, use_reentrant=self.reentrant)
        )
        return out


def made(model: nn.Module, **options: Any) -> tuple[NoiseOut, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return NoiseOut(
        model, optimizer, data=list(X), seed=1, **{"required_score": -1.0, "at_once": 1} | options
    ), optimizer


Extra = Callable[[nn.Module], Any]


def evaluated(model: nn.Module) -> Any:
    model.eval()
    out = [model(x) for x in X[3:]]  # torch.no_grad() forgotten, and the outputs kept
    model.train()
    return out


def without_gradients(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(X[3])


def copied(model: nn.Module) -> Any:
    twin = copy.deepcopy(model)
    return twin, twin(X[3])


EXTRAS: dict[str, Extra] = {
    "eval mode": evaluated,
    "no_grad": without_gradients,
    "a copy": copied,
    "a pickled copy": lambda model: pickle.loads(pickle.dumps(model))(X[3]),
    "thrown away": lambda model: model(X[3]).argmax(1),
    "thrown away, bad batch": lambda model: bool(model(X[3]).sum().isnan()),
}


@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_forward_passes_that_belong_to_no_loss_do_not_count(extra: str, when: str) -> None:
    """Three steps of two micro-batches: losses and weights are those of a run without the other
    passes.
    """

    def run(other: Extra | None) -> tuple[list[float], list[Tensor]]:
        model = Net()
        method, optimizer = made(model)
        seen, kept = [], []
        for step in range(3):
            optimizer.zero_grad()
            for part in range(2):
                kept.append(other(model) if other is not None and when == "before" else None)
                y = model(X[(step + part) % 3])
                kept.append(other(model) if other is not None and when == "between" else None)
                penalty = method.penalty()
                seen.append(float(penalty.detach()))
                (y.square().mean() + penalty).backward()
                kept.append(other(model) if other is not None and when == "after" else None)
            optimizer.step()
            method.step()
        return seen, [*model.parameters(), *method._outputs.layer.parameters()]  # type: ignore[union-attr]

    plain, weights = run(None)
    seen, others = run(EXTRAS[extra])
    assert seen == plain
    assert min(seen) > 0
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_a_merge_leaves_no_stale_graph_behind() -> None:
    """f09: validation without no_grad, then a merge, then a step."""
    model = Net()
    method, optimizer = made(model)
    for _ in range(3):
        y = model(X[0])
        (y.square().mean() + method.penalty()).backward()
        optimizer.step()
        method.step()
        # even one in training mode, whose outputs are still there
        kept = evaluated(model), model(X[1])
        method.end_epoch(lambda net: 1.0)
        del kept
    assert (
        method.stats()["merged"] == {"a": 3, "b": 0} or sum(method.stats()["merged"].values()) == 3
    )


@pytest.mark.parametrize("reentrant", [None, False])
def test_a_checkpoint_counts_once(reentrant: bool | None) -> None:
    model = Net(reentrant)
    method, optimizer = made(model)
    losses = []
    for i in range(3):
        y = model(X[i])
        penalty = method.penalty()
        losses.append(float(penalty.detach()))
        (y.square().mean() + penalty).backward()
        assert float(method.penalty()) == 0  # what backward computed again is no other forward pass
        optimizer.step()
        method.step()
        optimizer.zero_grad()
    plain = Net()
    method, optimizer = made(plain)
    for i, expected in enumerate(losses):
        y = plain(X[i])
        penalty = method.penalty()
        assert float(penalty.detach()) == pytest.approx(expected, rel=1e-6)
        (y.square().mean() + penalty).backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()


def never_in_training_mode(model: Net, method: NoiseOut) -> Tensor:
    y = model.eval()(X[0])
    return y.sum() + method.penalty()


def penalty_first(model: Net, method: NoiseOut) -> Tensor:
    return method.penalty() + model(X[0]).sum()


def only_in_backward(model: Net, method: NoiseOut) -> Tensor:
    return model(X[0]).sum() + method.penalty()


@pytest.mark.parametrize(
    ("loss", "reentrant"),
    [(never_in_training_mode, None), (penalty_first, None), (only_in_backward, True)],
)
def test_a_penalty_that_saw_nothing_is_an_error(loss: Any, reentrant: bool | None) -> None:
    model = Net(reentrant)
    method, optimizer = made(model)
    loss(model, method).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"saw no forward pass .* model\.train\(\)"):
        method.step()


def test_no_graph_outlives_its_loss() -> None:
    model = Net()
    method, optimizer = made(model)
    graphs = []
    model.b.register_forward_hook(lambda module, args, out: graphs.append(weakref.ref(out)))
    y = model(X[0])
    twin, other = copied(model)
    (y.sum() + method.penalty()).backward()
    optimizer.step()
    method.step()
    del y, other
    gc.collect()
    assert [graph() for graph in graphs] == [None] * len(graphs)
    assert len(graphs) == 2
    assert twin.head is not model.head


# --- layers that are called by keyword ------------------------------------------------------------


def by_name(layer: nn.Module, x: Tensor, **others: Any) -> Any:
    return layer(**others, **{next(iter(inspect.signature(layer.forward).parameters)): x})


class Keywords(nn.Module):
    """Layers of every type, called by position or by keyword, one of them twice."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.lstm, self.gru = nn.LSTM(4, 6, batch_first=True), nn.GRU(6, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.twice, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.named = named

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = x.view(len(x), 2, -1)
        if not self.named:
            h = self.conv(x).relu().transpose(1, 2)
            h = self.gru(self.lstm(h)[0])[0]
            h = self.attention(h, h, h)[0].mean(1)
            return {"out": (self.head(self.twice(self.twice(h).relu()).relu()),)}
        h = by_name(self.conv, x).relu().transpose(1, 2)
        h = by_name(self.gru, by_name(self.lstm, h)[0], hx=None)[0]
        h = self.attention(value=h, key=h, query=h)[0].mean(1)
        h = by_name(self.twice, by_name(self.twice, h).relu())
        return {"out": (by_name(self.head, h.relu()),)}


@pytest.mark.parametrize("which", ["pre", "post"])
def test_activations_are_the_same_by_keyword(which: Any) -> None:
    found = []
    for named in (False, True):
        model = Keywords(named)
        rewire.sparsify(model, density=0.5)
        method = rewire.methods.SET(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=0)
        pairs, output = Recorder(model, list(X), activations=which).record(method.pools, 0, 1)
        assert set(pairs) == {pool.number for pool in method.pools}
        assert output == method.pools[-1].number
        found.append(pairs)
    for number, pairs in found[0].items():
        assert len(pairs) == len(found[1][number])
        for a, b in zip(pairs, found[1][number], strict=True):
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.g, b.g)


@pytest.mark.parametrize(
    "name", ["codaset", "copaset", "corset", "codacorset", "copacorset", "ctre"]
)
def test_methods_that_look_at_activations_move_the_same_connections_by_keyword(name: str) -> None:
    states = []
    for named in (False, True):
        model = Keywords(named)
        rewire.sparsify(model, density=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = rewire.methods.create(name, model, optimizer, data=list(X), seed=2, fraction=0.5)
        for x in X:
            optimizer.zero_grad()
            model(x)["out"][0].square().mean().backward()
            optimizer.step()
            method.step()
        method.end_epoch()
        states.append(method.finalize().state_dict())
        assert method.stats()["grown"]["head.weight"] > 0
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class Packed(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.named, self.a, self.body, self.head = (
            named,
            nn.Linear(6, 8),
            nn.LSTM(8, 6),
            nn.Linear(6, 3),
        )

    def forward(self, x: Any) -> Tensor:
        if self.named:
            x = x._replace(data=self.a(input=x.data).tanh())
            return self.head(input=self.body(input=x)[1][0][0])
        x = x._replace(data=self.a(x.data).tanh())
        return self.head(self.body(x)[1][0][0])


def test_units_are_merged_the_same_way_by_keyword() -> None:
    merged = []
    data = [pack_sequence([torch.randn(n, 6) for n in (5, 4, 2)]) for _ in range(3)]
    for named in (False, True):
        model = Packed(named)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = NoiseOut(
            model, optimizer, data=data, targets="none", required_score=-1.0, at_once=4
        )
        model(data[0]).sum().backward()
        optimizer.step()
        method.step()
        method.end_epoch(lambda net: 1.0)
        assert sum(method.stats()["merged"].values()) == 4
        merged.append(method.finalize().state_dict())
    assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])


@pytest.mark.parametrize("named", [False, True])
def test_costs_are_counted_by_keyword(named: bool) -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 3, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.up(input=x) if named else self.up(x)
            return out

    assert rewire.nn.cost(Transposed(), torch.ones(4, 2, 5)).multiply_adds == 5 * 2 * 3 * 2

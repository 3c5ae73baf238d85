"""Networks that are hard to cut: methods that start dense cut them rightly, or name the layer and
change nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dense_harness import DATA, score
from harness import assert_identical
from rewire import methods

pytest.importorskip("torch_pruning")


class Tied(nn.Module):
    """Two layers with one weight; ``inner`` works on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).relu()
        y: Tensor = self.head(self.two(self.one(x).relu()).relu())
        return y


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.again, self.head = nn.Linear(12, 10), nn.Linear(10, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).relu()
        y: Tensor = self.head(self.again(self.again(x).relu()).relu())
        return y


class Skip(nn.Module):
    """Two residual branches; what the stem and they put out must be cut together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 10)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 10)) for _ in range(2)
        )
        self.head = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for branch in self.branches:
            x = x + branch(x)
        y: Tensor = self.head(x.relu())
        return y


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 6)),
        nn.Conv1d(2, 8, 3),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Conv1d(8, 8, 1, groups=4),
        nn.ReLU(),
        nn.Conv1d(8, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 6),
    )


class Own(nn.Module):
    """A layer of the user's: a weight that is used in a way no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 10) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.einsum("bi,ij,bj->bj", x, self.weight, x).tanh()
        return y


def unknown() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 10),
        nn.ReLU(),
        Own(),
        nn.Linear(10, 9),
        nn.ReLU(),
        nn.LayerNorm(9),
        nn.Linear(9, 8),
        nn.ReLU(),
        nn.Linear(8, 6),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "twice": Twice,
    "skip": Skip,
    "grouped": grouped,
    "unknown": unknown,
}

#: Settings under which much goes in eight steps; the cut itself changes no output.
SETTINGS: dict[str, dict[str, Any]] = {
    "noiseout": {"required_score": -100.0, "at_once": 3},
    "differentiable": {"units": "*", "initial": 0.9, "strength": 0.05},
    "differentiable-group": {"units": "*", "gate": "group", "initial": 0.9, "strength": 0.05},
    "differentiable-weights": {"weights": "*", "initial": 0.9, "strength": 0.0},
    "halo": {"density": 0.3, "after_epochs": 1},
    "ternary": {"density": 0.3, "after_epochs": 1},
}


def make(case: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> methods.Method:
    entry = methods.info(case.partition("-")[0])
    services: dict[str, Any] = {"data": DATA} if entry.takes_data else {}
    services |= {"evaluate": score} if "evaluate" in entry.services else {}
    return methods.create(entry.name, model, optimizer, seed=7, **services, **SETTINGS[case])


def whole(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, type]]:
    return copy.deepcopy(model.state_dict()), {
        name: type(module) for name, module in model.named_modules()
    }


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_cut_without_a_trace_or_refused_by_name_before_anything_changed(
    network: str, case: str
) -> None:
    torch.manual_seed(5)
    model = NETWORKS[network]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    state, types = whole(model)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    names = [name for name, module in model.named_modules() if name and not list(module.children())]
    try:
        method, refusal = make(case, model, optimizer), ""
    except ValueError as error:
        method, refusal = None, str(error)
    if method is None:
        assert set(names) & set(refusal.replace(".", " ").replace(",", " ").split()), refusal
        assert_identical(state, whole(model)[0])
        assert whole(model)[1] == types
        assert [
            (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ] == hooks
        assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
        return
    x = DATA[0][0]
    for time in range(8):
        generator = torch.Generator().manual_seed(time)
        batch = torch.randn(8, 12, generator=generator)
        labels = torch.randint(0, 6, (8,), generator=generator)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(batch), labels) + method.penalty()).backward()
        optimizer.step()
        method.step()
        if time % 4 == 3:
            method.end_epoch(score)
    before = model.eval()(x).detach()
    final = method.finalize()
    torch.testing.assert_close(final(x), before, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in final.parameters()) < sum(t.numel() for t in state.values()), (
        "nothing was cut"
    )
    assert {id(p) for p in final.parameters()} == {
        id(p) for g in optimizer.param_groups for p in g["params"]
    }
    nn.functional.cross_entropy(final(batch), labels).backward()
    optimizer.step()
    assert not torch.equal(final(x), before)
    torch.export.export(final, (x,))

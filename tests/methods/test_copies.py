"""A copy of a model under a method is a snapshot: what happens to the original does not move it,
and it trains.
"""

from __future__ import annotations

import copy
import gc
import weakref
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dense_harness import CASES as DENSE_CASES
from dense_harness import DenseRun
from dense_harness import case_id as dense_id
from harness import CASES, Run, case_id
from rewire import methods

X = torch.randn(9, 12, generator=torch.Generator().manual_seed(5))

#: Every method once, and once more those of which another setting keeps other things for the next
#: step.
SPARSE = [
    case
    for i, case in enumerate(CASES)
    if i == 0 or case[0] != CASES[i - 1][0] or case[1].get("candidates")
]
SPARSE = [("l1", {"l1": 0.005}) if name == "l1" else (name, settings) for name, settings in SPARSE]
DENSE = [*DENSE_CASES, ("ternary", {"threshold": 0.3, "density": 0.5, "after_epochs": 2})]
DIFFERENTIABLE: list[dict[str, Any]] = [
    {"weights": "*"},
    {"weights": "0", "weight_gate": "exclusive", "units": "2"},
    {"units": "*", "gate": "group"},
]


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(X)
    model.train()
    return found


def reached(start: nn.Module) -> list[object]:
    """All objects that a copy keeps alive, but for what is code."""
    seen: dict[int, object] = {id(start): start}
    waiting: list[object] = [start]
    while waiting:
        for found in gc.get_referents(waiting.pop()):
            if id(found) not in seen and not isinstance(
                found, type | ModuleType | FunctionType | CodeType
            ):
                seen[id(found)] = found
                waiting.append(found)
    return list(seen.values())


def alone(model: nn.Module) -> bool:
    """Whether a copy holds no graph, no method and no optimizer."""
    kinds = (methods.Method, torch.optim.Optimizer)
    return not any(
        issubclass(type(o), kinds) or (issubclass(type(o), Tensor) and o.grad_fn is not None)
        for o in reached(model)
    )


def taken(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """A copy and its outputs, which are the original's: to the bit, but where candidates on trial
    part a sum.
    """
    made = copy.deepcopy(model)
    found = outputs(made)
    assert torch.allclose(found, outputs(model), rtol=1e-4, atol=1e-6)
    return made, found


def follow_copies(run: Any, moments: list[int]) -> None:
    """Copy before, between backward and step, and after; train the original on; then the copies in
    their turn.
    """
    copies = []
    for time in range(9):
        if time in moments:
            copies.append(taken(run.model))
            run.backward()
            copies.append(taken(run.model))
            assert alone(copies[-1][0])
            run.optimizer.step()
            copies.append(taken(run.model))
            run.method.step()
            copies.append(taken(run.model))
            run.time += 1
        run.step()
    for number, (model, expected) in enumerate(copies):
        assert torch.equal(outputs(model), expected), number
    gone = []
    for model, _ in copies[::2]:
        twin = copy.copy(run)
        twin.model = model
        twin.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        twin.method = twin.make(11)
        untouched = outputs(run.model)
        first = [p.detach().clone() for p in model.parameters()]
        for _ in range(5):
            twin.step()
        now = list(model.parameters())
        assert any(
            a.shape != b.shape or not torch.equal(a, b) for a, b in zip(now, first, strict=True)
        )
        gone.append(weakref.ref(twin.method))
        twin.method.finalize()
        assert torch.equal(outputs(run.model), untouched)
    del twin
    gc.collect()
    assert [found() for found in gone] == [None] * len(gone)
    run.method.finalize()
    for number, (model, expected) in enumerate(copies):
        if number % 2:
            assert torch.equal(outputs(model), expected), number


@pytest.mark.parametrize("case", SPARSE, ids=case_id)
def test_copies_of_sparse_models(case: tuple[str, dict[str, Any]]) -> None:
    follow_copies(Run(case, "linear"), [2, 5])


@pytest.mark.parametrize("case", DENSE, ids=dense_id)
def test_copies_of_dense_models(case: tuple[str, dict[str, Any]]) -> None:
    follow_copies(DenseRun(case, "mlp"), [0, 5])


@pytest.mark.parametrize("settings", DIFFERENTIABLE, ids=str)
def test_copies_take_their_gates_along(settings: dict[str, Any]) -> None:
    follow_copies(DenseRun(("differentiable", settings), "mlp"), [2])


def test_copies_take_gates_of_branches_along() -> None:
    follow_copies(
        DenseRun(
            ("differentiable", {"branches": ["middle", "head"], "gate": "competitive"}), "lstm"
        ),
        [2],
    )


def test_gates_of_a_copy_must_fit() -> None:
    run = DenseRun(("differentiable", {"units": "*"}), "mlp")
    model = copy.deepcopy(run.model)
    with pytest.raises(
        ValueError,
        match=r"0 has a gate of .*non-competitive.* from another "
        r"Differentiable",
    ):
        methods.Differentiable(model, torch.optim.Adam(model.parameters()), units="*", gate="group")

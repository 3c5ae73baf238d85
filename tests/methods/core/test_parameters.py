"""Declarations of hyper-parameters: what they accept, and what subclasses make of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rewire import methods
from rewire.methods import parameter
from rewire.methods.core.parameters import Count, Epochs, setting
from rewire.nn import SparseLinear


def made(method: Any, **given: Any) -> Any:
    model = torch.nn.Sequential(SparseLinear(8, 8, density=0.3), SparseLinear(8, 8, density=0.3))
    return method(model, torch.optim.SGD(model.parameters(), lr=0.1), **given)


def test_a_plain_class_attribute_is_the_new_default_of_a_declaration() -> None:
    class Often(methods.RigL):
        every = 3
        skip_step = False
        fraction: float = 0.5

    method = made(Often)
    assert (method.every, method.skip_step, method.fraction(0)) == (3, False, 0.5)
    assert made(Often, every=7).every == 7
    with pytest.raises(ValueError, match="every must be a whole number of steps of at least 1"):
        made(Often, every=0)
    with pytest.raises(ValueError, match="fraction must be"):
        made(Often, fraction=9.0)
    assert methods.RigL.declared()["every"].default is None


def test_kinds_of_numbers_bring_their_bounds_which_a_declaration_may_widen() -> None:
    class Counted(methods.SET):
        times: Count | None = parameter(default=None, help="how often")
        after: Epochs = setting(default=0, low=0, help="from when on")
        every: int = 5

    declared = Counted.declared()
    assert declared["times"].allowed() == "a whole number of at least 1, or None"
    assert declared["after"].allowed() == "a whole number of epochs of at least 0"
    saved = {name: found.declared.saved for name, found in declared.items()}
    assert (saved["times"], saved["after"], saved["every"]) == (False, True, True)
    assert made(Counted).after == 0
    for bad in ({"times": 0}, {"after": -1}, {"every": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be a whole number"):
            made(Counted, **bad)


def test_an_error_in_a_declaration_does_not_switch_checks_off() -> None:
    class Braces(methods.SET):
        kind: int = parameter(default=1, low=1, help="one of a set {1, 2}")

    assert Braces.declared()["kind"].help == "one of a set {1, 2}"
    with pytest.raises(ValueError, match="kind must be a whole number of at least 1, not 0"):
        made(Braces, kind=0)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (methods.SET, {"fraction": [0.2]}),
        (methods.SET, {"fraction": np.float32(7)}),
        (methods.SET, {"fraction": lambda t: "x"}),
        (methods.SET, {"fraction": True}),
        (methods.SET, {"every": 2.0}),
        (methods.DeepR, {"l1": b"ab"}),
        (methods.DeepR, {"noise": object()}),
        (methods.DeepR, {"temperature": "warm"}),
        (methods.MEST, {"milestones": b"ab"}),
        (methods.MEST, {"soft": 1}),
        (methods.RigL, {"candidates": True}),
        (methods.RigL, {"regrown": None}),
    ],
)
def test_what_fits_no_declaration_is_refused_by_name(method: Any, given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        made(method, **given)


def test_a_group_that_cannot_load_a_part_is_as_before() -> None:
    model = torch.nn.Sequential(SparseLinear(8, 8, density=0.3), SparseLinear(8, 8, density=0.3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    group = methods.Group(model, optimizer, {"0": methods.SET, "1": methods.RigL}, seed=3)
    state = group.state_dict()
    state["0"] |= {"steps": 6, "seed": 5}
    state["1"] = {**state["1"], "own": {}}
    with pytest.raises(ValueError, match="incomplete or damaged"):
        group.load_state_dict(state)
    assert [method.steps for method in group.methods.values()] == [0, 0]
    assert [method.seed for method in group.methods.values()] == [3, 3]

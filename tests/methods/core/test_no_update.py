"""A run whose schedule allowed no single update says so at its end; others do not."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch

from dense_harness import DenseRun
from harness import Run
from rewire import methods

#: Schedules that are longer than 3 steps of one epoch, and what the warning says of them.
LONG: dict[str, tuple[dict[str, Any], str]] = {
    "codaset": ({}, "at the end of every epoch but the last"),
    "codacorset": ({}, "at the end of every epoch but the last"),
    "copaset": ({}, "at the end of every epoch but the last"),
    "copacorset": ({}, "at the end of every epoch but the last"),
    "corset": ({"every": 9}, "every=9 steps"),
    "ctre": ({}, "at the end of every epoch but the last"),
    "deep-r": ({"every": 9}, "every=9 steps"),
    "dsr": ({"every": 9, "until": 20}, "every=9 steps, until=20"),
    "gmp": (
        {"density": 0.1, "every": 9, "begin": 5, "until": 50},
        "begin=5, every=9, until=50 steps",
    ),
    "granet": (
        {"density": 0.1, "every": 9, "begin": 5, "until": 50},
        "begin=5, every=9, until=50 steps",
    ),
    "itop": ({"every": 9}, "every=9 steps"),
    "l1": ({"every_epochs": 9}, "every_epochs=9"),
    "magnitude": ({"density": 0.1, "every_epochs": 2}, "every_epochs=2"),
    "mest": ({"every_epochs": 5}, "every_epochs=5, but not after the last"),
    "one-shot": ({"density": 0.1, "after_epochs": 5}, "after_epochs=5"),
    "rigl": ({"every": 9}, "every=9 steps"),
    "set": ({}, "at the end of every epoch but the last"),
    "snfs": ({}, "at the end of every epoch but the last"),
    "snip": ({"density": 0.1, "batches": 4}, "batches=4"),
    "srigl": ({"every": 9}, "every=9 steps"),
    "top-kast": ({"until": 0}, "until=0"),
}
DENSE: dict[str, tuple[dict[str, Any], str]] = {
    "halo": ({"after_epochs": 5}, "after_epochs=5"),
    "noiseout": ({"warmup": 3}, "the first warmup=3"),
    "ternary": ({"after_epochs": 5}, "after_epochs=5"),
}
#: Methods that act in every step, or leave the topology alone, or cut in `finalize` by design.
NONE = {
    "differentiable": {},
    "halo": {},
    "l1": {},
    "soft-deep-r": {},
    "static": {},
    "deep-r": {},
    "top-kast": {},
}


for _name in set(methods.available()) - {*LONG, *DENSE, *NONE}:  # new ones with intervals
    _budget = {"density": 0.1} if methods.info(_name).takes_budget else {}
    LONG[_name] = ({**_budget, "every": 9, "until": 50}, "every=9")


def test_every_method_is_covered() -> None:
    assert set(LONG) | set(DENSE) | set(NONE) == set(methods.available())


def begin(name: str, settings: dict[str, Any]) -> Any:
    dense = methods.info(name).cls.starts_dense
    return DenseRun((name, settings)) if dense else Run((name, settings))


@pytest.mark.parametrize("name", [*LONG, *DENSE])
def test_a_run_without_an_update_says_so(name: str) -> None:
    settings, words = (LONG | DENSE)[name]
    if name == "noiseout":
        pytest.importorskip("torch_pruning")
    run = begin(name, settings)
    for _ in range(3):
        run.step()
    words_of_all = (
        r"made no update in its steps \([0-3]\) and epochs \(0\), because its "
        r"schedule "
        r"allowed none"
    )
    with pytest.warns(UserWarning, match=words_of_all) as caught:
        run.method.finalize()
    assert len(caught) == 1
    assert words in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.method.finalize()  # once


@pytest.mark.parametrize("name", NONE)
def test_methods_without_a_schedule_say_nothing(name: str) -> None:
    run = begin(name, NONE[name])
    for _ in range(3):
        run.step()
    run.method.finalize()


@pytest.mark.parametrize("name", ["set", "rigl", "gmp", "mest"])
def test_an_update_is_enough_also_before_a_resume(name: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "set": {},
        "rigl": {"every": 4},
        "gmp": {"density": 0.1, "every": 4, "until": 40},
        "mest": {"every": 1},
    }
    run = begin(name, settings[name])
    for _ in range(5):
        run.step()
    second = begin(name, settings[name])
    second.model.load_state_dict(run.model.state_dict())
    second.method.load_state_dict(run.method.state_dict())
    for each in (run, second):
        each.method.finalize()
    # Nothing was trained: nothing to say either.
    begin(name, settings[name]).method.finalize()


def test_what_was_not_called_is_named() -> None:
    run = begin("set", {})
    run.backward()
    run.optimizer.step()
    with pytest.warns(
        UserWarning,
        match=r"call end_epoch\(\) after every epoch, and call "
        r"step\(\) after every",
    ):
        run.method.finalize()


def test_each_method_of_a_group_says_it() -> None:
    run = Run(("static", {}))
    group = methods.Group(
        run.model, run.optimizer, {"0": partial(methods.RigL, every=100), "2": methods.SET}, seed=1
    )
    for _ in range(3):
        run.optimizer.zero_grad()
        run.model(torch.randn(4, 12)).square().mean().backward()
        run.optimizer.step()
        group.step()
    with pytest.warns(UserWarning, match="made no update") as caught:
        group.finalize()
    assert [str(w.message).split()[0] for w in caught] == ["RigL", "SET"]

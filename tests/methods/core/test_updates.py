"""When methods update in a training of known length: as published if it is long, ten times at least
if it is short.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from rewire import methods
from rewire.methods.core.updates import in_epochs, in_steps
from rewire.nn import SparseLinear

#: Methods that move or cut connections at intervals, and what they publish.
MOVING = (
    "codacorset",
    "codaset",
    "copacorset",
    "copaset",
    "corset",
    "ctre",
    "deep-r",
    "dsr",
    "gmp",
    "granet",
    "itop",
    "mest",
    "rigl",
    "set",
    "snfs",
    "srigl",
    "top-kast",
)


def train(name: str, steps: int, epochs: int, known: bool = True, **options: Any) -> methods.Method:
    """A small network trained by a method that knows how long."""
    torch.manual_seed(3)
    entry = methods.info(name)
    density = 0.25 if entry.start_density is None else 0.6
    model = nn.Sequential(
        SparseLinear(16, 24, density=density), nn.ReLU(), SparseLinear(24, 5, density=density)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.randn(steps, 8, 16), torch.randint(0, 5, (steps, 8))
    services: dict[str, Any] = {"data": list(x[:4]), "density": 0.25}
    services |= {"steps": steps, "epochs": epochs} if known else {}
    given = {service: value for service, value in services.items() if service in entry.services}
    method = methods.create(name, model, optimizer, seed=1, **given, **options)
    for epoch in range(epochs):
        for step in range(epoch * steps // epochs, (epoch + 1) * steps // epochs):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[step]), y[step]).backward()
            optimizer.step()
            method.step()
        method.end_epoch(last=epoch == epochs - 1)
    with warnings.catch_warnings():
        if not known:  # some make no update in so short a training, and say so
            warnings.simplefilter("ignore")
        method.finalize()
    return method


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize(("steps", "epochs"), [(24, 1), (60, 3)])
def test_a_short_training_has_ten_updates(name: str, steps: int, epochs: int) -> None:
    method = train(name, steps, epochs)
    assert method.updates >= 10
    grown = sum(method.stats()["grown"].values()) + sum(method.stats()["dropped"].values())
    assert grown > 0


def test_all_methods_with_intervals_are_here() -> None:
    takes = {
        n for n in methods.available() if {"every", "until"} & methods.info(n).parameters().keys()
    }
    elsewhere = {"magnitude", "noiseout"}  # by epochs, as `rewire train` sets them
    assert takes - elsewhere <= set(MOVING)


@pytest.mark.parametrize(
    "name", [n for n in MOVING if n not in ("deep-r", "gmp", "granet", "mest")]
)
def test_the_last_quarter_of_a_known_training_moves_nothing(name: str) -> None:
    method: Any = train(name, 40, 2)
    assert method.until == 30
    assert method.updates <= 31  # top-kast chooses after the first step too


def test_by_steps() -> None:
    assert in_steps(None, None, 100, None) == (100, None)
    assert in_steps(None, None, 100, 100_000) == (100, 75_000)
    assert in_steps(None, None, 100, 1000) == (75, 750)
    assert in_steps(None, 500, 100, 1000) == (50, 500)
    assert in_steps(None, None, 100, 1000, last=0.5, begin=100) == (40, 500)
    assert in_steps(7, None, 100, 1000) == (7, 750)
    assert in_steps(7, 300, 100, None) == (7, 300)
    assert in_steps(None, None, 100, 4) == (1, 3)
    with pytest.raises(ValueError, match="steps must be the number of steps of the whole training"):
        in_steps(None, None, 100, 0)


def test_by_epochs() -> None:
    assert in_epochs(None, None, None, None) == ("epoch", None)
    assert in_epochs(None, None, 4000, 40) == ("epoch", 30)
    assert in_epochs(None, None, 800, 8) == (60, 600)
    assert in_epochs(None, None, 800, 8, scheduled=True) == ("epoch", 6)
    assert in_epochs("epoch", None, 800, 8) == ("epoch", 6)
    assert in_epochs(None, 7, 800, 8) == ("epoch", 7)
    assert in_epochs(50, None, 800, 8) == (50, 600)
    assert in_epochs(50, 90, 800, 8) == (50, 90)
    with pytest.raises(
        ValueError, match="epochs must be the number of epochs of the whole training"
    ):
        in_epochs(None, None, 10, 1.5)  # type: ignore[arg-type]


def test_without_a_length_the_published_intervals_hold() -> None:
    published: dict[str, Any] = {
        "rigl": 100,
        "srigl": 100,
        "itop": 4000,
        "dsr": 500,
        "top-kast": 100,
    }
    published |= {"set": "epoch", "copaset": "epoch"}
    for name, every in published.items():
        method: Any = train(name, 12, 2, known=False)
        assert (method.every, method.until) == (every, None)
    mest: Any = train("mest", 12, 2, known=False)
    assert (mest.every, mest.epochs_between, mest.fraction.milestones) == ("epoch", 5, (90, 120))
    mest = train("mest", 160, 160)
    assert (mest.every, mest.fraction.milestones, mest.updates) == (5, (90, 120), 32)
    mest = train("mest", 12, 2, every=1)
    assert (mest.every, mest.epochs_between, mest.fraction.milestones) == ("epoch", 1, (90, 120))

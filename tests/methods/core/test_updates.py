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
from rewire.methods.core.updates import Timing, fill_in
from rewire.nn import SparseLinear

#: Methods that move or cut connections at intervals of steps.
MOVING = sorted(
    name
    for name in methods.available()
    if "every" in methods.info(name).parameters() and name != "noiseout"  # its checks need a score
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
    services |= {"total_steps": steps, "total_epochs": epochs} if known else {}
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


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in MOVING
        if name not in ("deep-r", "mest") and not methods.info(name).takes_budget
    ],
)
def test_the_last_quarter_of_a_known_training_moves_nothing(name: str) -> None:
    method: Any = train(name, 40, 2)
    assert method.until == 30
    assert method.updates <= 31  # top-kast chooses after the first step too


def steps(every: int | None, until: int | None, total: int | None, **given: Any) -> Any:
    timing = fill_in(Timing(every, until=until), Timing(every=100), total, None, **given)
    assert timing.every_epochs is timing.until_epochs is None
    return timing.every, timing.until


def test_by_steps() -> None:
    assert steps(None, None, None) == (100, None)
    assert steps(None, None, 100_000) == (100, 75_000)
    assert steps(None, None, 1000) == (75, 750)
    assert steps(None, 500, 1000) == (50, 500)
    assert steps(None, None, 1000, last=0.5, begin=100) == (40, 500)
    assert steps(7, None, 1000) == (7, 750)
    assert steps(7, 300, None) == (7, 300)
    assert steps(None, None, 4) == (1, 3)


def test_by_epochs() -> None:
    def filled(total_steps: int | None, total_epochs: int | None, **given: Any) -> Timing:
        fixed = given.pop("fixed", False)
        published = Timing(every_epochs=1)
        return fill_in(Timing(**given), published, total_steps, total_epochs, fixed=fixed)

    assert filled(None, None) == Timing(every_epochs=1)
    assert filled(4000, 40) == Timing(every_epochs=1, until_epochs=30)
    assert filled(800, 8) == Timing(every=60, until=600)
    assert filled(800, 8, fixed=True) == Timing(every_epochs=1, until_epochs=6)
    assert filled(800, 8, every_epochs=1) == Timing(every_epochs=1, until_epochs=6)
    assert filled(800, 8, until_epochs=7) == Timing(every_epochs=1, until_epochs=7)
    assert filled(800, 8, every=50) == Timing(every=50, until=600)
    assert filled(800, 8, every=50, until=90) == Timing(every=50, until=90)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every": 3, "every_epochs": 1}, "not both"),
        ({"every": 3, "until_epochs": 1}, "give until="),
        ({"every_epochs": 3, "until": 1}, "give until_epochs="),
        ({"until": 1}, "give until_epochs="),
        ({"every": 0}, "every must be a whole number of steps of at least 1, or None, not 0"),
        ({"until_epochs": 1.5}, "until_epochs must be a whole number of epochs .* not 1.5"),
        ({"total_steps": 0}, "total_steps must be a whole number of steps of at least 1"),
    ],
)
def test_steps_and_epochs_are_not_mixed(given: dict[str, Any], message: str) -> None:
    model = SparseLinear(8, 8, density=0.5)
    with pytest.raises(ValueError, match=message):
        methods.SET(model, torch.optim.SGD(model.parameters(), lr=0.1), **given)


def test_without_a_length_the_published_intervals_hold() -> None:
    published: dict[str, Any] = {
        "rigl": 100,
        "srigl": 100,
        "itop": 4000,
        "dsr": 500,
        "top-kast": 100,
    }
    for name, every in published.items():
        method: Any = train(name, 12, 2, known=False)
        assert (method.every, method.until) == (every, None)
    for name in ("set", "copaset"):
        method = train(name, 12, 2, known=False)
        assert (method.every, method.every_epochs, method.until_epochs) == (None, 1, None)
    mest: Any = train("mest", 12, 2, known=False)
    assert (mest.every, mest.every_epochs, mest.fraction.milestones) == (None, 5, (90, 120))
    mest = train("mest", 160, 160)
    assert (mest.every, mest.fraction.milestones, mest.updates) == (5, (90, 120), 32)
    mest = train("mest", 12, 2, every_epochs=1)
    assert (mest.every, mest.every_epochs, mest.fraction.milestones) == (None, 1, (90, 120))

"""Methods that start from dense layers refuse at once what the cut at their end could not cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.nn.utils import parametrizations, prune

import rewire

METHODS: dict[str, Callable[..., Any]] = {
    "halo": lambda m, o, **kw: rewire.methods.Halo(m, o, density=0.5, **kw),
    "ternary": lambda m, o, **kw: rewire.methods.Ternary(m, o, density=0.5, after_epochs=1, **kw),
}
REFUSED: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        r"0\.weight has a "
        r"prune mask",
    ),
    "parametrized": (parametrizations.weight_norm, "0 has a parametrization of weight"),
    "hook": (
        lambda layer: layer.weight.register_hook(lambda g: g),
        r"0\.weight has a hook on its "
        r"gradient",
    ),
    "forward": (lambda layer: setattr(layer, "forward", lambda x: x), "0 has a forward of its own"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("method", METHODS)
def test_what_could_not_be_cut_is_refused_at_construction(method: str, case: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    change, message = REFUSED[case]
    change(model[0])
    optimizer = optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=message):
        METHODS[method](model, optimizer)
    assert METHODS[method](model, optimizer, exclude="0") is not None  # the other layer can be
    model[2](torch.ones(1, 8)).sum().backward()

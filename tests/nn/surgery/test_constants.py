"""Units that are constant: what they give goes into the biases of those that read them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewire.nn import surgery
from rewire.nn.surgery import UnitGraph, fold


def constant_unit(model: nn.Module, layer: str, unit: int, value: float) -> None:
    module: Any = model.get_submodule(layer)
    with torch.no_grad():
        module.weight[unit] = 0
        module.bias[unit] = value


@pytest.mark.parametrize("padding", ["none", "replicate", "zeros"])
@pytest.mark.parametrize("norm", [False, True])
def test_constants_fold_into_biases(padding: str, norm: bool) -> None:
    """A channel that is constant goes without a trace, where biases (or a BatchNorm behind) can
    take it.
    """
    pad: dict[str, Any] = {
        "none": {},
        "replicate": {"padding": 1, "padding_mode": "replicate"},
        "zeros": {"padding": 1},
    }
    second = nn.Conv2d(4, 5, 3, bias=not norm, **pad[padding])
    behind = nn.BatchNorm2d(5) if norm else nn.Identity()
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), second, behind, nn.ReLU(), nn.Conv2d(5, 2, 1)
    )
    x = torch.randn(3, 2, 7, 7)
    train_mode = model.train()(x)  # running statistics move
    assert train_mode.isfinite().all()
    constant_unit(model.eval(), "0", 2, 0.7)
    expected = model(x)
    graph = UnitGraph(model, x)
    group = graph.group("0")
    if padding == "zeros":
        assert not surgery.takes_constants(graph, group)
        with pytest.raises(ValueError, match="2 pads with zeros"):
            fold(graph, group, group.consumers[0], torch.tensor(2), 0.7)
        return
    fold(graph, group, group.consumers[0], torch.tensor(2), 0.7)
    graph.remove({"0": [2]})
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_without_bias_a_constant_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    graph = UnitGraph(model, torch.randn(2, 3))
    group = graph.group("0")
    with pytest.raises(ValueError, match="2 has no bias"):
        fold(graph, group, group.consumers[0], torch.tensor(0), 1.0)

"""Units that depend on each other linearly, and NoiseOut for a model that has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewire.methods import NoiseOut

pytest.importorskip("torch_pruning")


def method(model: nn.Module, x: Tensor, **options: Any) -> NoiseOut:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    made = NoiseOut(model, optimizer, data=[x], seed=1, **({"targets": "none"} | options))
    model(x).sum().backward()
    optimizer.step()
    made.step()
    return made


def dependent(layer: Any, u: int, v: int, alpha: float, beta: float) -> None:
    """Unit u of the layer is alpha times unit v plus beta, before any activation."""
    with torch.no_grad():
        layer.weight[u] = alpha * layer.weight[v]
        layer.bias[u] = alpha * layer.bias[v] + beta

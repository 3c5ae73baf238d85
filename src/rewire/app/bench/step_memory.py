"""The task of `rewire.app.bench.child` that measures the memory of a training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rewire.app.bench.networks import mlp
from rewire.app.bench.timing import Clock
from rewire.app.resident import Memory, trim
from rewire.nn import SparseLinear

__all__ = ["step_memory"]


def step_memory(
    memory: Memory, clock: Clock, *, kind: str, width: int, layers: int, rows: int, density: float
) -> dict[str, Any]:
    """The highest memory of a training step of a perceptron, dense or sparse, over what is there
    before it: parameters, their gradients, the optimizer's state, x and the labels.
    """
    torch.manual_seed(0)
    sizes = [width] * (layers + 1)

    def layer(inputs: int, outputs: int, _: int) -> nn.Module:
        if kind == "dense":
            return nn.Linear(inputs, outputs)
        return SparseLinear(inputs, outputs, density=density)

    model = mlp(sizes, layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x, y = torch.randn(rows, width), torch.randint(width, (rows,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    step()
    trim()
    return {"peak": memory.peak_of(step, memory.now())}

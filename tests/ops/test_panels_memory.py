"""A training step of many rows needs no more memory than a dense one's activations."""

from __future__ import annotations

import pytest

from interpreter import run_python
from rewire import _native
from rewire.app.resident import can_measure

STEP = """
import torch
from torch import nn
from rewire.app.resident import Memory
from rewire.nn import SparseLinear
torch.set_num_threads(2)
torch.manual_seed(0)
ROWS, WIDTH, LAYERS = 8192, 1024, 4

def step(model, x):
    model(x).square().mean().backward()
    return sum(p.numel() for p in model.parameters()) * 4

def peak(layer):
    model = nn.Sequential(*(m for _ in range(LAYERS) for m in (layer(), nn.ReLU())))
    x = torch.randn(ROWS, WIDTH)
    step(model, x[:8])  # loads what is loaded lazily
    model.zero_grad()
    memory = Memory()
    memory.reset()
    before = memory.now()
    gradients = step(model, x)
    print(memory.peak() - before - gradients)
"""


def activations(layer: str) -> float:
    """Megabytes at the highest, without the gradients of weights, in a process of its own."""
    done = run_python(STEP + f"peak(lambda: {layer})")
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 2**20


@pytest.mark.skipif(
    not _native.available("spmm") or not can_measure(), reason="needs the kernels, and /proc"
)
@pytest.mark.parametrize("density", [0.01, 0.1])
def test_no_activation_is_copied(density: float) -> None:
    """The six activations of 32 MB that a dense step holds at once: one more would be a copy."""
    dense = activations("nn.Linear(WIDTH, WIDTH, bias=False)")
    sparse = activations(f"SparseLinear(WIDTH, WIDTH, density={density}, bias=False)")
    assert dense > 5 * 32
    assert sparse < dense + 4

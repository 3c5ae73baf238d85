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

def peak(layer):
    model = nn.Sequential(*(m for _ in range(LAYERS) for m in (layer(), nn.ReLU())))
    x = torch.randn(ROWS, WIDTH)

    def step(x):
        model(x).square().mean().backward()

    step(x[:8])  # loads what is loaded lazily, and makes the gradients of weights
    memory = Memory()
    memory.reset()
    before = memory.now()
    step(x)
    print(memory.peak() - before)
"""


def activations(layer: str) -> float:
    """Megabytes at the highest beyond weights and their gradients, in a process of its own."""
    done = run_python(STEP + f"peak(lambda: {layer})")
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 2**20


@pytest.mark.skipif(
    not _native.available("spmm") or not can_measure(), reason="needs the kernels, and /proc"
)
def test_no_activation_is_copied() -> None:
    """A dense step holds eight activations of 32 MB at once. One more would be a copy, and is what
    a feature-major sparse step needs."""
    dense = activations("nn.Linear(WIDTH, WIDTH, bias=False)")
    assert dense > 7 * 32
    for density in (0.01, 0.1):
        sparse = activations(f"SparseLinear(WIDTH, WIDTH, density={density}, bias=False)")
        print(dense, sparse)
        assert sparse < dense + 4

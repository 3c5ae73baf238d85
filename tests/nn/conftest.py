"""What the tests of `rewire.nn` share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewire import topology
from rewire.nn import SparseLinear, SparseWeight

Dormant = Callable[[SparseWeight, int], tuple[Tensor, Tensor]]


@pytest.fixture
def dormant() -> Dormant:
    """``count`` random dormant positions of a pool."""

    def draw(weight: SparseWeight, count: int, step: int = 0) -> tuple[Tensor, Tensor]:
        none = torch.empty(0, dtype=torch.int64)
        return topology.sample_dormant(
            weight.index, *weight.matrix_shape, count, none, none, 3, step, 1
        )

    return draw


@pytest.fixture
def twin() -> Callable[[SparseLinear], nn.Linear]:
    """The `torch.nn.Linear` that a layer stands for."""

    def make(layer: SparseLinear) -> nn.Linear:
        dense = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype
        )
        with torch.no_grad():
            dense.weight.copy_(layer.weight.to_dense())
            if layer.bias is not None:
                dense.bias.copy_(layer.bias)
        return dense

    return make


@pytest.fixture
def check_pool() -> Callable[[SparseWeight], None]:
    """Everything that must be true of a pool at any time."""

    def check(weight: SparseWeight) -> None:
        fresh = topology.build_index(weight.rows, weight.cols, *weight.matrix_shape)
        assert all(torch.equal(a, b) for a, b in zip(weight.index, fresh, strict=True))
        assert weight.connections == int((weight.rows >= 0).sum()) == int(weight.index.row_ptr[-1])
        assert (
            weight.capacity == weight.values.numel() == weight.rows.numel() == weight.cols.numel()
        )
        assert not weight.values.detach()[weight.rows < 0].any()

    return check

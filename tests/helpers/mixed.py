"""A network with every kind of sparse layer, empty slots, and a weight without connections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rewire
from rewire.nn import SparseLinear, SparseWeight


class Mixed(nn.Module):
    """A convolution, a recurrent layer, attention, a norm, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 4)
        self.norm = nn.BatchNorm1d(6)
        self.gru = nn.GRU(6, 5, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).transpose(1, 2)
        h = self.gru(h)[0]
        h = self.attention(h, h, h, need_weights=False)[0].mean(1)
        out: Tensor = self.head(h)
        return out


def mixed() -> Any:
    """The network, sparse, in eval mode. One weight has empty slots, one no connection."""
    torch.manual_seed(3)
    model: Any = rewire.sparsify(Mixed(), density=0.3)
    with torch.no_grad():
        model.norm.running_mean.uniform_()
        model.norm.running_var.uniform_(1, 2)
    weight = SparseWeight((8, 10), 20, capacity=30)
    weight.values.data[:20].normal_()
    model.head[0] = SparseLinear.from_weight(weight, torch.randn(8))
    empty = torch.zeros(0, dtype=torch.int64)
    nothing = SparseWeight.from_coo((3, 8), empty, empty, torch.zeros(0), capacity=1)
    model.head[2] = SparseLinear.from_weight(nothing)
    return model.eval()


def same(state: dict[str, Tensor], model: nn.Module) -> None:
    """The state loads into the dense network and gives the same bits as ``model``."""
    again = rewire.load(Mixed().eval(), state)
    expected = dict(rewire.sparse_weights(model))
    for name, weight in rewire.sparse_weights(again):
        for found, wanted in zip(weight.coo(), expected.pop(name).coo(), strict=True):
            assert torch.equal(found, wanted), name
    assert not expected
    x = torch.randn(2, 3, 20)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))

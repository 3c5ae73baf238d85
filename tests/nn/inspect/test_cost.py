"""Parameters, bytes and multiply-adds of networks, against counts by hand."""

from __future__ import annotations

import torch
from torch import nn

import rewire
from rewire.nn import SparseConv2d, SparseLinear, cost


def test_a_convolutional_network_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        SparseConv2d(8, 4, 3, connections=50, bias=False),
        nn.Flatten(),
        nn.Linear(4 * 16, 10),
        SparseLinear(10, 5, connections=7),
    ).train()
    found = cost(model, torch.randn(4, 3, 6, 6))
    by_name = {layer.name: layer for layer in found.layers}
    assert by_name["0"].multiply_adds == 8 * 3 * 9 * 36
    assert by_name["3"].multiply_adds == 50 * 16
    assert by_name["5"].multiply_adds == 640
    assert by_name["6"].multiply_adds == by_name["6"].connections == 7
    assert [layer.units for layer in found.layers] == [8, 4, 10, 5]
    assert found.multiply_adds == sum(layer.multiply_adds for layer in found.layers)
    assert found.parameters == 8 * 27 + 8 + 16 + 50 + 650 + 7 + 5
    assert found.bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert model.training and model[1].num_batches_tracked == 0  # noqa: PT018


def test_zeros_are_no_connections_and_attention_counts_its_projections() -> None:
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[0] = 0
    (found,) = cost(nn.Sequential(layer), torch.randn(2, 6)).layers
    assert (found.connections, found.multiply_adds) == (18, 24)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.attention(x, x, x)[0]
            return y

    model = Attend()
    (dense,) = cost(model, torch.randn(3, 5, 8)).layers
    assert dense.multiply_adds == 4 * 64 * 5
    rewire.sparsify(model, density=0.25)
    (sparse,) = cost(model, torch.randn(3, 5, 8)).layers
    assert sparse.multiply_adds == sparse.connections * 5 == 64 * 5


def test_recurrent_layers_count_every_step() -> None:
    dense = nn.LSTM(4, 6, batch_first=True)
    (found,) = cost(nn.Sequential(dense), torch.randn(3, 5, 4)).layers
    assert found.multiply_adds == (4 * 6 * 4 + 4 * 6 * 6) * 5
    sparse = rewire.nn.SparseLSTM(4, 6, batch_first=True, density=0.5)
    (found,) = cost(nn.Sequential(sparse), torch.randn(3, 5, 4)).layers
    assert found.multiply_adds == found.connections * 5

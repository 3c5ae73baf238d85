"""Sums of captured calls, against autograd on dense layers and plain unfolding."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from problems import LAYOUTS, in_layout
from rewire import topology
from rewire.nn import (
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseLinear,
    SparseLSTM,
    SparseMultiheadAttention,
    densify,
    sparse_weights,
)
from rewire.ops import Geometry, Pair, pairs

D = torch.float64
CONV: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv1d": (
        SparseConv1d(4, 6, 3, stride=2, padding=1, dilation=2, density=0.2, dtype=D),
        (4, 11),
    ),
    "conv1d-groups": (
        SparseConv1d(4, 6, 3, groups=2, padding="same", density=0.2, dtype=D),
        (4, 9),
    ),
    "conv2d": (
        SparseConv2d(4, 6, (2, 3), stride=(2, 1), padding=(1, 2), density=0.2, dtype=D),
        (4, 5, 6),
    ),
    "conv2d-groups": (
        SparseConv2d(6, 9, 3, groups=3, dilation=(1, 2), padding=1, density=0.2, dtype=D),
        (6, 6, 5),
    ),
    "conv2d-same": (SparseConv2d(2, 3, (5, 3), padding="same", density=0.4, dtype=D), (2, 5, 6)),
    "conv2d-circular": (
        SparseConv2d(2, 3, 3, padding=1, padding_mode="circular", density=0.4, dtype=D),
        (2, 5, 6),
    ),
    "conv2d-depthwise": (SparseConv2d(4, 8, 3, groups=4, density=0.4, dtype=D), (4, 5, 4)),
    "conv3d": (
        SparseConv3d(2, 4, 2, stride=(1, 2, 1), groups=2, padding=1, density=0.4, dtype=D),
        (2, 3, 4, 3),
    ),
}
ALL = CONV | {
    "linear": (SparseLinear(7, 5, density=0.3, dtype=D), (7,)),
    "linear-3d": (SparseLinear(7, 5, density=0.3, dtype=D), (3, 7)),
}


def capture(layer: nn.Module, x: Tensor) -> None:
    for _, weight in sparse_weights(layer):
        weight.capture = []
    layer(x).square().sum().backward()


def positions(weight: Any) -> tuple[topology.Index, Tensor, Tensor]:
    """An index of some positions, dormant and active ones, in shuffled slots with an empty one."""
    rows, cols = topology.sample(*weight.matrix_shape, weight.size // 2, 5)
    order = torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(1))
    rows, cols = (torch.cat([t[order], torch.tensor([-1])]) for t in (rows, cols))
    return topology.build_index(rows, cols, *weight.matrix_shape), rows, cols


@pytest.mark.parametrize("kind", ALL)
def test_block_and_at_are_the_dense_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = ALL[kind]
    x = torch.randn(3, *shape, dtype=D, generator=torch.Generator().manual_seed(2))
    capture(layer, x)
    (pair,) = layer.weight.capture
    twin = _twin(layer)
    twin(x).square().sum().backward()
    truth = twin.weight.grad.reshape(layer.weight.matrix_shape)
    rows = truth.shape[0]
    assert pair.matrix_shape == tuple(truth.shape)
    for elements in (1, 200, 1 << 21):  # pieces of one channel and one sample, of some, and one
        monkeypatch.setattr(pairs, "_UNFOLDED_ELEMENTS", elements)
        for start, stop in ((0, rows), (1, rows - 1), (rows - 1, rows), (2, 2)):
            torch.testing.assert_close(pair.block(start, stop), truth[start:stop])
    index, r, c = positions(layer.weight)
    sums = pair.at(index, r.numel())
    torch.testing.assert_close(sums[:-1], truth[r[:-1], c[:-1]])
    assert sums[-1] == 0


def _twin(layer: nn.Module) -> Any:
    return densify(nn.Sequential(copy.deepcopy(layer)))[0]


@pytest.mark.parametrize("kind", ALL)
def test_norms_are_those_of_what_block_multiplies(kind: str) -> None:
    """Cosine similarities from sums and norms are those of the rows and (unfolded) columns written
    out.
    """
    layer, shape = ALL[kind]
    x = torch.randn(3, *shape, dtype=D, generator=torch.Generator().manual_seed(3))
    capture(layer, x)
    (pair,) = layer.weight.capture
    rows, cols = pair.matrix_shape
    if pair.geometry is None:
        columns, outputs = pair.x.t().unsqueeze(0), pair.g.t()
    else:
        columns, outputs = unfolded(pair), pair.g.movedim(1, 0).reshape(rows, -1)
    torch.testing.assert_close(pair.row_norms(), outputs.square().sum(1))
    torch.testing.assert_close(pair.col_norms(), columns.square().sum(2))
    group = torch.arange(rows) // (rows // pair.groups)
    expected = torch.stack(
        [
            nn.functional.cosine_similarity(outputs[r : r + 1], columns[group[r]], 1, 0.0)
            for r in range(rows)
        ]
    )
    scale = (pair.row_norms()[:, None] * pair.col_norms()[group]).sqrt()
    torch.testing.assert_close(
        torch.where(scale > 0, pair.block(0, rows) / scale, 0.0), expected.nan_to_num(0.0)
    )
    assert pair.col_norms().shape == (pair.groups, cols)


def unfolded(pair: Pair) -> Tensor:
    """(groups, columns, samples x positions), by loops over the definition of a convolution."""
    geometry = pair.geometry
    assert geometry is not None
    per_group, sizes = pair.x.shape[1] // geometry.groups, pair.g.shape[2:]
    kk, samples = math.prod(geometry.kernel), pair.x.shape[0]
    out = torch.zeros(geometry.groups, per_group, kk, samples, math.prod(sizes), dtype=D)
    for k, kernel in enumerate(
        torch.cartesian_prod(*map(torch.arange, geometry.kernel)).view(-1, len(sizes)).tolist()
    ):
        for p, place in enumerate(
            torch.cartesian_prod(*map(torch.arange, sizes)).view(-1, len(sizes)).tolist()
        ):
            at = [
                p_ * s + k_ * d - low
                for p_, s, k_, d, low in zip(
                    place,
                    geometry.stride,
                    kernel,
                    geometry.dilation,
                    geometry.padding[::2],
                    strict=True,
                )
            ]
            if all(0 <= a < n for a, n in zip(at, pair.x.shape[2:], strict=True)):
                value = pair.x[(slice(None), slice(None), *at)]  # (batch, channels)
                out[:, :, k, :, p] = value.t().view(geometry.groups, per_group, -1)
    return out.view(geometry.groups, per_group * kk, -1)


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_recurrent_layers_and_attention_capture_what_sums_to_the_dense_gradient(kind: str) -> None:
    layer: Any
    if kind == "lstm":
        layer = SparseLSTM(
            4, 6, num_layers=2, bidirectional=True, proj_size=3, density=0.3, dtype=D
        )
        x: tuple[Tensor, ...] = (torch.randn(5, 3, 4, dtype=D),)
    else:
        layer = SparseMultiheadAttention(8, 2, kdim=5, vdim=6, density=0.3, dtype=D)
        x = (
            torch.randn(4, 3, 8, dtype=D),
            torch.randn(5, 3, 5, dtype=D),
            torch.randn(5, 3, 6, dtype=D),
        )
    twin = _twin(layer)
    for _, weight in sparse_weights(layer):
        weight.capture = []
    for net in (layer, twin):
        for factor in (1.0, 0.5):  # two calls
            net(*(factor * t for t in x))[0].square().sum().backward()
    dense = dict(twin.named_parameters())
    for name, weight in sparse_weights(layer):
        total = sum(pair.block(0, weight.matrix_shape[0]) for pair in weight.capture)
        torch.testing.assert_close(total, dense[name].grad, msg=name)
        index, r, c = positions(weight)
        found = sum(pair.at(index, r.numel()) for pair in weight.capture)
        torch.testing.assert_close(found[:-1], dense[name].grad[r[:-1], c[:-1]], msg=name)


def test_narrow_pairs_are_summed_in_float32() -> None:
    g, x = torch.ones(4096, 2, dtype=torch.bfloat16), torch.ones(4096, 3, dtype=torch.bfloat16)
    assert torch.equal(Pair(x, g).block(0, 2), torch.full((2, 3), 4096.0))
    geometry = Geometry((1,), (1,), (0, 0), (1,), 1)
    pair = Pair(x.t().reshape(1, 3, -1), g.t().reshape(1, 2, -1), geometry)
    assert torch.equal(pair.block(0, 2), torch.full((2, 3), 4096.0))
    assert torch.equal(pair.row_norms(), torch.full((2,), 4096.0))


@pytest.mark.skipif(not pairs._has_onednn(), reason="torch has no oneDNN here")
@pytest.mark.parametrize("g_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_large_tiles_are_the_same_product(
    x_layout: str, g_layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    has = pairs._has_onednn
    monkeypatch.setattr(pairs, "_LARGE", 1)
    monkeypatch.setattr(pairs, "_has_onednn", lambda: called.append(1) or has())
    for batch, rows, cols in ((1, 1, 1), (2, 3, 300), (128, 64, 7), (5, 100, 1)):
        x, g = (
            in_layout(torch.randn(batch, cols), x_layout),
            in_layout(torch.randn(batch, rows), g_layout),
        )
        block = Pair(x, g).block(0, rows)
        torch.testing.assert_close(
            block, (g.double().t() @ x.double()).float(), atol=1e-4, rtol=1e-4
        )
        assert block.is_contiguous()
    assert len(called) == 4
    assert Pair(torch.zeros(0, 3), torch.zeros(0, 2)).block(0, 2).tolist() == [[0.0] * 3] * 2

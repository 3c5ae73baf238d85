"""Sparse convolutions in networks: made of dense ones and back, compiled, exported."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from test_conv import make, use_reference
from torch import nn

from rewire.nn import SparseConv1d, SparseConv2d, SparseConv3d, densify, sparsify


def test_sparsify_and_densify_a_conv_net() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2, dilation=(1, 2), bias=False),
        nn.Flatten(2),
        nn.Conv1d(8, 4, 3, padding=1),
        nn.Unflatten(2, (1, 2, 3)),
        nn.Conv3d(4, 2, 1),
    )
    x = torch.randn(2, 3, 7, 8)
    expected = model(x)
    whole = sparsify(copy.deepcopy(model), density=1.0, select="magnitude")
    assert [type(m) for m in whole] == [
        SparseConv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        SparseConv2d,
        nn.Flatten,
        SparseConv1d,
        nn.Unflatten,
        SparseConv3d,
    ]
    torch.testing.assert_close(whole(x), expected, rtol=1e-4, atol=1e-5)
    sparse = sparsify(model, density=0.3)
    y = sparse(x)
    back = densify(sparse)
    assert [type(m) for m in back] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        nn.Conv2d,
        nn.Flatten,
        nn.Conv1d,
        nn.Unflatten,
        nn.Conv3d,
    ]
    torch.testing.assert_close(back(x), y, rtol=1e-4, atol=1e-5)


# --- compiled, exported ---------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, while tracing
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("reference", [False, True])
def test_compiles(reference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if reference:
        use_reference(monkeypatch)
    net = nn.Sequential(
        make(2, 3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        make(2, 6, 4, 3, stride=2, groups=2),
    ).eval()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=False)
    for last in (False, True):
        x = torch.randn(4, 3, 8, 8)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        wanted = [x, *net.parameters()]
        results = []
        for function in (net, compiled):
            y = function(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        assert results[1][0].stride() == results[0][0].stride()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_exports_with_a_dynamic_batch(rank: int) -> None:
    layer = make(rank, 3, 4, 3, padding=1)
    batch = torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(
        layer, (torch.randn(10, 3, *(6,) * rank),), dynamic_shapes=({0: batch},)
    )
    x = torch.randn(33, 3, *(6,) * rank)
    torch.testing.assert_close(program.module()(x), layer(x))

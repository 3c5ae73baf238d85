"""Convolutions whose strides or dilations pass over most of their input: the numbers of torch.nn,
in little memory.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewire.nn import SparseConv1d, SparseConv2d, SparseConv3d
from rewire.ops.geometry import Geometry, gathered

SPARSE: dict[int, Any] = {1: SparseConv1d, 2: SparseConv2d, 3: SparseConv3d}
DENSE: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@contextlib.contextmanager
def at_most(mib: int) -> Iterator[None]:
    """Let no allocation take the process beyond what it has now and ``mib`` more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + mib * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def both(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y: Tensor = layer(x)
    (y * torch.arange(1.0, y.numel() + 1).view(y.shape).to(y)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


WIDE: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "stride, one output": ((3, 2, 5), {"kernel_size": 3, "stride": 2**12, "padding": 3}),
    "stride": ((2, 2, 450), {"kernel_size": 3, "stride": 200, "padding": 1}),
    "stride and padding": ((2, 2, 5), {"kernel_size": 3, "stride": 100, "padding": 400}),
    "dilation": ((2, 2, 5), {"kernel_size": 2, "dilation": 500, "padding": 250}),
    "dilation, groups": (
        (2, 2, 700),
        {"kernel_size": 3, "dilation": 300, "padding": 1, "groups": 2},
    ),
    "same": ((2, 2, 7), {"kernel_size": 3, "dilation": 300, "padding": "same"}),
    "rows": ((2, 2, 150, 6), {"kernel_size": (2, 3), "stride": (140, 1), "padding": (3, 1)}),
    "columns": ((2, 2, 5, 6), {"kernel_size": 3, "dilation": (1, 100), "padding": (1, 100)}),
    "three": (
        (2, 2, 5, 4, 6),
        {"kernel_size": 2, "stride": (2, 90, 90), "dilation": (70, 1, 1), "padding": (40, 1, 1)},
    ),
}


@pytest.mark.parametrize("case", WIDE)
def test_wide_convolutions_are_those_of_torch(case: str) -> None:
    shape, arguments = WIDE[case]
    rank = len(shape) - 2
    layer = SPARSE[rank](2, 4, density=0.6, dtype=torch.float64, **arguments)
    dense = DENSE[rank](2, 4, dtype=torch.float64, **arguments)
    with torch.no_grad():
        dense.weight.copy_(layer.weight.to_dense())
        dense.bias.copy_(layer.bias)
    x = torch.randn(shape, dtype=torch.float64)
    _, narrow = gathered(x, layer._geometry)
    assert narrow != layer._geometry, "the case is none of this kind"
    for mine, theirs in zip(both(layer, x), both(dense, x), strict=True):
        torch.testing.assert_close(mine, theirs)
    rows, cols = layer.weight.rows.long(), layer.weight.cols.long()
    torch.testing.assert_close(layer.weight.values.grad, dense.weight.grad.flatten(1)[rows, cols])
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_ordinary_convolutions_are_left_alone() -> None:
    x = torch.randn(1, 1, 16000)
    for kernel, stride, dilation in (
        (3, 1, 1),
        (64, 64, 1),
        (400, 160, 1),
        (2, 1, 512),
        (11, 4, 1),
    ):
        geometry = Geometry((kernel,), (stride,), (0, 0), (dilation,), 1)
        assert gathered(x, geometry) == (x, geometry)


HUGE: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {
    "stride": ((1, 1, 5), {"kernel_size": 3, "stride": 2**26, "padding": 3}, (1, 1, 1)),
    "stride and padding": (
        (2, 1, 5),
        {"kernel_size": 3, "stride": 2**26, "padding": 2**27},
        (2, 1, 5),
    ),
    "beyond 32 bits": ((2, 1, 5), {"kernel_size": 3, "stride": 2**40, "padding": 2**40}, (2, 1, 3)),
    "dilation": ((2, 1, 5), {"kernel_size": 2, "dilation": 2**26, "padding": 2**25}, (2, 1, 5)),
    "rows": (
        (2, 1, 5, 6),
        {"kernel_size": 3, "stride": (2**26, 1), "padding": (3, 1)},
        (2, 1, 1, 6),
    ),
    "columns": (
        (1, 1, 5, 6),
        {"kernel_size": 3, "dilation": (1, 2**24), "padding": (1, 2**24)},
        (1, 1, 5, 6),
    ),
    "planes": ((1, 1, 5, 4, 6), {"kernel_size": 2, "stride": 2**24, "padding": 1}, (1, 1, 1, 1, 1)),
}


@pytest.mark.parametrize("case", HUGE)
def test_huge_strides_paddings_and_dilations_take_little_memory(case: str) -> None:
    shape, arguments, expected = HUGE[case]
    rank = len(shape) - 2
    layer = SPARSE[rank](1, 1, density=1.0, **arguments)
    x = torch.randn(shape)
    both(layer, x)  # threads and scratch of a first call
    with at_most(64):
        y, grad = both(layer, x)
    assert y.shape == expected
    # By hand: every connection reads one position, or padding.
    by_hand = torch.zeros_like(y) + layer.bias.detach().view(-1, *(1,) * rank)
    geometry = layer._geometry
    weight = layer.weight.to_dense().detach()[0, 0]
    sums = torch.zeros_like(x)
    upstream = torch.arange(1.0, y.numel() + 1).view(y.shape)
    for tap in torch.cartesian_prod(*map(torch.arange, weight.shape)).view(-1, rank).tolist():
        for out in torch.cartesian_prod(*map(torch.arange, y.shape[2:])).view(-1, rank).tolist():
            at = [
                t * geometry.dilation[a] + o * geometry.stride[a] - geometry.padding[2 * a]
                for a, (t, o) in enumerate(zip(tap, out, strict=True))
            ]
            if all(0 <= p < n for p, n in zip(at, shape[2:], strict=True)):
                by_hand[(slice(None), 0, *out)] += weight[tuple(tap)] * x[(slice(None), 0, *at)]
                sums[(slice(None), 0, *at)] += weight[tuple(tap)] * upstream[(slice(None), 0, *out)]
    torch.testing.assert_close(y, by_hand)
    torch.testing.assert_close(grad, sums)

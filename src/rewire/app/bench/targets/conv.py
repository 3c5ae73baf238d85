"""P8: a sparse 3x3 convolution and a block around it, against the best dense ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rewire.app.bench.curves import Setting
from rewire.app.bench.timing import Contender
from rewire.app.bench.verdict import Measured, at_least
from rewire.nn import SparseConv2d

__all__ = ["against_dense", "channels_last", "step"]

#: Channels, height and width, batch.
SHAPES = ((64, 32, 32), (128, 16, 32), (256, 8, 64))


def step(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward to x and all parameters, with a gradient of the output's own layout."""
    leaf = x.detach().requires_grad_()
    inputs = [leaf, *module.parameters()]
    with torch.no_grad():
        g = torch.randn_like(module(x))

    def run() -> object:
        return torch.autograd.grad(module(leaf), inputs, g)

    return run


def channels_last(module: nn.Module) -> nn.Module:
    """The module, with its 4-D weights channels-last."""
    result: nn.Module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return result


def _block(conv: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2))


def against_dense(
    setting: Setting,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    targets: Sequence[tuple[float, float]] = ((0.10, 2.0), (0.05, 4.0)),
    block: tuple[float, float] = (0.05, 1.5),
) -> Measured:
    """P8: sparse convolutions, and a block around one, against the faster dense layout."""
    figures = []
    for channels, side, batch in shapes:
        plain = torch.randn(batch, channels, side, side)
        last = plain.contiguous(memory_format=torch.channels_last)
        dense = nn.Conv2d(channels, channels, 3, padding=1)
        dense_last = channels_last(nn.Conv2d(channels, channels, 3, padding=1))
        density, at = block
        block_dense = channels_last(_block(nn.Conv2d(channels, channels, 3, padding=1), channels))
        block_sparse = _block(
            SparseConv2d(channels, channels, 3, padding=1, density=density), channels
        )
        contenders = [
            Contender("dense NCHW", step(dense, plain)),
            Contender("dense last", step(dense_last, last)),
        ]
        contenders += [
            Contender(
                f"sparse {d}", step(SparseConv2d(channels, channels, 3, padding=1, density=d), last)
            )
            for d, _ in targets
        ]
        contenders += [
            Contender("dense block", step(block_dense, last)),
            Contender("sparse block", step(block_sparse, last)),
        ]
        timings = setting.contest(contenders)
        shape = f"{channels} channels {side} x {side}, batch {batch}"
        best = min(("dense NCHW", "dense last"), key=timings.median)
        figures += [
            at_least(f"{shape}, {d:.0%}, over {best}", timings.ratio(best, f"sparse {d}"), target)
            for d, target in targets
        ]
        figures.append(
            at_least(
                f"{shape}, conv-BN-ReLU-pool at {density:.0%}",
                timings.ratio("dense block", "sparse block"),
                at,
            )
        )
    return figures, {}

"""Sparse against dense 3x3 convolutions, forward + backward through autograd, side by side in one
process.

    python benchmarks/conv.py [--threads 2] [--repeats 21] [--cpu-time]

Prints, for each size, density and memory format, milliseconds (medians) and how many times faster
than the best dense convolution (channels-last or NCHW) the sparse layer is; then the same for a
conv-BatchNorm-ReLU-pool block against the dense channels-last block. On a busy machine, `--threads
1 --cpu-time` counts the time the thread ran only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rewire.nn import SparseConv2d

SIZES = [(64, 32, 32), (128, 16, 32), (256, 8, 64)]  # channels, height and width, batch
DENSITIES = (0.1, 0.05)
FORMATS = {"channels-last": torch.channels_last, "NCHW": torch.contiguous_format}


def step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """One forward and backward pass, input gradient included."""
    wanted = [x.requires_grad_(), *layer.parameters()]
    g = torch.randn_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), wanted, g)


def block(conv: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2))


def medians(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Milliseconds of each call; calls take turns, so that a disturbance hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            start = clock()
            call()
            if turn >= 2:
                times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    for channels, size, batch in SIZES:
        calls, blocks = {}, {}
        for name, layout in FORMATS.items():
            x = torch.randn(batch, channels, size, size).contiguous(memory_format=layout)
            dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=layout)
            calls[f"dense {name}"] = step(dense, x)
            blocks[f"dense {name}"] = step(block(dense, channels), x)
            for density in DENSITIES:
                sparse = SparseConv2d(channels, channels, 3, padding=1, bias=False, density=density)
                calls[f"{density:.0%} {name}"] = step(sparse, x)
                blocks[f"{density:.0%} {name}"] = step(block(sparse, channels), x)
        for title, group in (("layer", calls), ("block", blocks)):
            found = medians(group, arguments.repeats, clock)
            dense_only = [t for name, t in found.items() if name.startswith("dense")]
            best = min(dense_only) if title == "layer" else found["dense channels-last"]
            print(f"{title} {channels} channels, {size} x {size}, batch {batch}")
            for name, milliseconds in found.items():
                print(f"    {name:20s} {milliseconds:8.2f} ms   x {best / milliseconds:.2f}")


if __name__ == "__main__":
    main()

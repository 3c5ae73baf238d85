"""The network before and after training: its size, and how long it takes, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewire.app.train.batches import Inputs
from rewire.app.train.remaining import structure
from rewire.nn.forward.modes import evaluating
from rewire.nn.inspect.cost import cost
from rewire.storage import tensors as tensor_file

__all__ = ["ROWS", "Timing", "compare", "file_size", "in_turns", "size"]

ROWS = 256  # samples at a time whose inference is timed
SECONDS = 0.5  # for all rounds
LEAST, MOST = 15, 301  # rounds
BLOCK = 0.001  # seconds of one measurement, long enough for the clock


@dataclass(frozen=True)
class Timing:
    """Milliseconds for a batch of ``samples``; speedup is before / after within a round."""

    samples: int
    threads: int
    rounds: int
    before_ms: float
    after_ms: float
    speedup: float
    quartiles: tuple[float, float]


def file_size(model: nn.Module) -> int:
    """Bytes of the model's ``state_dict`` as a safetensors file."""
    return tensor_file.size(model.state_dict())


def size(
    model: nn.Module, x: Tensor | Inputs, file_bytes: int, *, stack: bool = True
) -> dict[str, Any]:
    """What the network costs for inputs like ``x``, as plain numbers, with the length of its file.

    Besides the units that a layer has it says how many of them are active: with connections in and
    out.
    """
    found = cost(model, x[:2]).to_json()
    active = structure(model, stack=stack).units
    for layer in found["layers"]:
        layer["active_units"] = active.get(f"{layer['name']}.weight", layer["units"])
    return {
        "parameters": found["parameters"],
        "bytes": found["bytes"],
        "file_bytes": file_bytes,
    } | found


def compare(
    before: nn.Module, after: nn.Module, x: Tensor | Inputs, file_bytes: int, *, stack: bool = True
) -> dict[str, Any]:
    """Sizes of both networks and time of inference for (the first `ROWS` of) ``x``, for
    `result.json`.

    ``file_bytes`` is the length of the file that holds ``after``; ``stack`` as for `structure`.
    """
    x = x[:ROWS]
    return {
        "before": size(before, x, file_size(before), stack=stack),
        "after": size(after, x, file_bytes, stack=stack),
        "inference": asdict(in_turns(before, after, x)),
    }


def in_turns(
    before: nn.Module,
    after: nn.Module,
    x: Tensor,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time inference of both with the threads that are set, in rounds in which the first to run
    changes.

    A slow moment of the machine meets both alike, so the ratio within a round counts, and its
    median over rounds.
    """
    models = (before, after)
    calls, took = [], ([], [])  # type: tuple[list[int], tuple[list[float], list[float]]]
    with evaluating(*models):
        for model in models:
            model(x)  # fills the caches
            start = clock()
            model(x)
            calls.append(max(1, min(1000, int(BLOCK / max(clock() - start, 1e-7)))))
        begun, rounds = clock(), 0
        while rounds < LEAST or (rounds < MOST and clock() - begun < SECONDS):
            for which in (0, 1) if rounds % 2 else (1, 0):
                models[which](x)
                start = clock()
                for _ in range(calls[which]):
                    models[which](x)
                took[which].append((clock() - start) / calls[which])
            rounds += 1
    ratios = [slow / max(fast, 1e-12) for slow, fast in zip(*took, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(
        samples=len(x),
        threads=torch.get_num_threads(),
        rounds=rounds,
        before_ms=1000 * statistics.median(took[0]),
        after_ms=1000 * statistics.median(took[1]),
        speedup=middle,
        quartiles=(low, high),
    )

"""P9: bytes per connection in training."""

from __future__ import annotations

from typing import Any

from rewire.app.bench import child
from rewire.app.bench.curves import Setting
from rewire.app.bench.verdict import Figure, at_most, info

__all__ = ["per_connection"]

Measured = tuple[list[Figure], dict[str, Any]]
SHOWN = {"sgd": "SGD", "momentum": "SGD + momentum", "adam": "Adam"}


def per_connection(
    setting: Setting,
    size: int = 10_000,
    connections: int | None = None,
    batch: int = 8,
    bars: tuple[float, float, float] = (36.0, 40.0, 44.0),
    rebuild: float = 24.0,
) -> Measured:
    """P9: peak of training over its activations, for three optimizers; and what an index rebuild
    needs besides.

    With 10^7 connections or more every tensor is larger than what the C library keeps for reuse, so
    resident memory is what is in use.
    """
    connections = connections or (10_000_000 if setting.quick else 20_000_000)
    figures, data = [], {}
    for (kind, shown), bar in zip(SHOWN.items(), bars, strict=True):
        arguments = {"optimizer": kind, "size": size, "connections": connections, "batch": batch}
        measured = child.measure(
            "training", arguments, threads=setting.threads, cpu_time=setting.cpu_time
        )
        data[kind] = measured
        figures.append(at_most(f"training, {shown}", measured["training"] / connections, bar, "B"))
        figures.append(
            at_most(f"index rebuild, {shown}", measured["rebuild"] / connections, rebuild, "B more")
        )
    for key, shown in (
        ("reorder", "reorder()"),
        ("set", "SET update of 30 %"),
        ("deep_r", "DEEP R step"),
    ):
        if key in data["sgd"]:
            figures.append(info(f"{shown}, SGD", data["sgd"][key] / connections, "B more"))
    figures.append(info("construction", data["sgd"]["built"] / connections, "B"))
    return figures, data

"""P9 to P11 and P16: memory in training, and layers far larger than their dense form could be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rewire import methods
from rewire.app.bench import machine
from rewire.app.bench.curves import Setting
from rewire.app.bench.verdict import Figure, Measured, at_least, at_most, info, missing
from rewire.app.errors import NotAvailable

__all__ = [
    "fit",
    "line",
    "million",
    "per_connection",
    "step_memory",
    "updates",
    "with_sparse_memory",
]

LADDER = (10**4, 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8)


#: The optimizers of P9.
OPTIMIZERS = {"sgd": "SGD", "momentum": "SGD + momentum", "adam": "Adam"}


def per_connection(
    setting: Setting,
    size: int = 10_000,
    connections: int | None = None,
    batch: int = 8,
    targets: tuple[float, float, float] = (36.0, 40.0, 44.0),
    rebuild: float = 24.0,
) -> Measured:
    """P9: peak of training over its activations, for three optimizers; and what an index rebuild
    needs besides.

    With 10^7 connections or more every tensor is larger than what the C library keeps for reuse, so
    resident memory is what is in use.
    """
    connections = connections or (10_000_000 if setting.quick else 20_000_000)
    figures, data = [], {}
    for (kind, shown), target in zip(OPTIMIZERS.items(), targets, strict=True):
        measured = setting.apart(
            "training", optimizer=kind, size=size, connections=connections, batch=batch
        )
        data[kind] = measured
        figures.append(
            at_most(f"training, {shown}", measured["training"] / connections, target, "B")
        )
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


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least squares y = a + b x: (a, b, R^2)."""
    n = len(x)
    if n < 2 or n != len(y):
        raise ValueError(f"a line needs two points or more, not {len(x)} and {len(y)}")
    mean_x, mean_y = sum(x) / n, sum(y) / n
    spread = sum((v - mean_x) ** 2 for v in x)
    slope = sum((v - mean_x) * (w - mean_y) for v, w in zip(x, y, strict=True)) / spread
    offset = mean_y - slope * mean_x
    total = sum((w - mean_y) ** 2 for w in y)
    left = sum((w - offset - slope * v) ** 2 for v, w in zip(x, y, strict=True))
    return offset, slope, 1.0 - left / total if total else 1.0


def line(
    setting: Setting,
    size: int = 30_000,
    batch: int = 32,
    ladder: Sequence[int] = LADDER,
    scaling_from: int = 10**6,
) -> Measured:
    """P10: step time and memory over the number of connections, each in a process of its own."""
    if setting.quick:
        ladder = [k for k in ladder if k <= 10**7]
    points: list[dict[str, Any]] = []
    left_out = ""
    for k in ladder:
        free = machine.available_memory()
        # Construction peaks near 60 bytes a connection; a machine that starts to swap measures its
        # disk.
        if free is not None and free < 100 * k + 10**9:
            left_out = (
                f"K = {k:.0e} needs more memory than the {free / 2**30:.1f} GiB that are free"
            )
            break
        try:
            points.append(
                setting.apart(
                    "point",
                    size=size,
                    connections=k,
                    batch=batch,
                    steps=5,
                    seconds=setting.seconds / 2,
                )
            )
        except NotAvailable as error:
            left_out = f"K = {k:.0e}: {error}"
            break
    if len(points) < 3:
        raise NotAvailable(left_out or "fewer than three points")
    ks = [float(p["connections"]) for p in points]
    times, sizes = [p["seconds"] for p in points], [float(p["bytes"]) for p in points]
    _, slope, straight = fit(ks, times)
    _, per_connection, memory_straight = fit(ks, sizes)
    figures = [
        at_least(
            "step time a + b K: R^2", straight, 0.99, "", f"b = {1e9 * slope:.3g} ns a connection"
        ),
        at_least(
            "memory a + b K: R^2",
            memory_straight,
            0.99,
            "",
            f"b = {per_connection:.3g} B a connection",
        ),
    ]
    high = [(k, p) for k, p in zip(ks, points, strict=True) if k >= scaling_from]
    if len(high) >= 2:
        logs = [math.log(k) for k, _ in high]
        power = fit(logs, [math.log(p["seconds"]) for _, p in high])[1]
        of_best = fit(logs, [math.log(p["best"]) for _, p in high])[1]
        note = f"best times {of_best:.3f}, K = {high[0][0]:.0e} to {high[-1][0]:.0e}"
        figures.append(
            at_most("log-log slope of time, distance from 1", abs(power - 1), 0.1, "", note)
        )
        figures.append(info("log-log slope of time", power, "", note))
    if left_out:
        figures.append(missing("the end of the line", left_out))
    last = points[-1]
    note = f"{1e3 * last['seconds']:.4g} ms, {last['bytes'] / 2**30:.2f} GiB"
    figures.append(
        info(
            f"K = {last['connections']:.0e}: nanoseconds a connection",
            1e9 * times[-1] / ks[-1],
            "ns",
            note,
        )
    )
    return figures, {"points": points, "size": size, "batch": batch}


def million(
    setting: Setting,
    size: int = 10**6,
    connections: int = 10**7,
    batch: int = 32,
    gib: float = 4.0,
    share: float = 60.0,
) -> Measured:
    """P11: a 10^6 x 10^6 layer with DEEP R, beside how fast rows can be read at random."""
    got = setting.apart(
        "million", size=size, connections=connections, batch=batch, steps=10, rounds=setting.rounds
    )
    note = (
        f"forward + backward {1e3 * got['pass_seconds']:.4g} ms; the rows alone "
        f"{1e3 * got['ceiling_seconds']:.4g} ms, "
        f"{got['nanoseconds_per_row']:.3g} ns each at best"
    )
    reached = Figure(
        "share of the random-row-read ceiling",
        100 * got["share"],
        "%",
        ">=",
        share,
        100 * got["share_low"],
        100 * got["share_high"],
        f"{note}; best times {100 * got['share_of_best']:.3g} %",
    )
    return [
        at_most(
            "peak of the whole process: build, 10 steps, DEEP R", got["peak"] / 2**30, gib, "GiB"
        ),
        reached,
        info("build", got["build_seconds"], "s"),
        info(
            "DEEP R step",
            1e3 * got["rewire_seconds"],
            "ms",
            f"{got['rewired']:,} rewired in 10 steps",
        ),
    ], {"million": got}


def step_memory(
    setting: Setting,
    width: int = 1024,
    layers: int = 4,
    rows: int = 8192,
    density: float = 0.1,
    target: float = 1.0,
) -> Measured:
    """P16: what a training step of a sparse perceptron needs at its highest, besides its parameters
    and their optimizer's state, over what the dense one needs besides its own: activations and
    their gradients. (Each in a process of its own, with SGD and momentum.)
    """
    case = {"width": width, "layers": layers, "rows": rows, "density": density}
    found = {kind: setting.apart("step", kind=kind, **case) for kind in ("dense", "sparse")}
    mebibytes = {kind: got["peak"] / 2**20 for kind, got in found.items()}
    note = f"{mebibytes['sparse']:.1f} / {mebibytes['dense']:.1f} MiB; an activation of a layer is "
    note += f"{4 * rows * width / 2**20:.1f} MiB"
    name = f"{layers} layers of width {width}, {density:.0%}, {rows} rows: over dense"
    ratio = found["sparse"]["peak"] / found["dense"]["peak"]
    return [at_most(name, ratio, target, "x", note)], found


def with_sparse_memory() -> list[str]:
    """The methods of the registry that rewire in O(K) memory."""
    about = [methods.info(name) for name in methods.available()]
    return [info.name for info in about if info.memory == "O(K)" and info.cls.needs_room]


def updates(
    setting: Setting,
    names: Sequence[str],
    size: int = 10**6,
    connections: int = 10**7,
    batch: int = 32,
    gib: float = 4.0,
) -> Measured:
    """Peak of the process with a layer of 10^6 x 10^6 that trains and is updated once by each
    method.

    Gradients and similarities of sampled candidates, which is the methods' default in a layer of
    that size.
    """
    figures: list[Figure] = []
    found: dict[str, Any] = {}
    for name in names:
        try:
            got = setting.apart(
                "update", method=name, size=size, connections=connections, batch=batch
            )
        except NotAvailable as error:
            figures.append(missing(name, str(error)))
            continue
        found[name] = got
        what = (
            f"an update {got['update_seconds']:.3g} s, {got['replaced']:,} replaced"
            if got["updates"]
            else "no update"
        )
        note = f"{what}; a step {got['step_seconds']:.3g} s, built in {got['build_seconds']:.3g} s"
        figures.append(at_most(name, got["peak"] / 2**30, gib, "GiB", note))
    return figures, found

"""What `rewire bench` measures besides its targets: a grid, a layer, a model, a wide network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rewire.app.bench import curves, machine, models
from rewire.app.bench.contenders import LAYERS, Layer
from rewire.app.bench.curves import Curve, Setting
from rewire.app.bench.targets.conv import channels_last
from rewire.app.bench.targets.conv import step as conv_step
from rewire.app.bench.timing import Contender, Ratio
from rewire.app.errors import BenchError, NotAvailable
from rewire.nn import SparseConv2d

__all__ = ["WIDE", "grid", "layer", "model", "wide"]

DENSITIES = (0.01, 0.05, 0.10, 0.20, 0.50)
#: Where a model's layers are measured besides the density asked for, to find where they break even.
BREAK_EVEN = (0.02, 0.1, 0.3, 0.6, 1.0)
#: Outputs x inputs, batch.
GRID = (
    (256, 256, 128),
    (1024, 1024, 1),
    (1024, 1024, 32),
    (1024, 1024, 128),
    (4096, 1024, 128),
    (4096, 4096, 128),
)
QUICK_GRID = ((256, 256, 128), (1024, 1024, 32), (1024, 1024, 128))
#: Inputs, classes and samples. The hidden layers are those of the SET authors' largest network.
WIDE: dict[str, tuple[int, int, int]] = {"leukemia": (7070, 2, 72), "lung": (3312, 5, 203)}

Progress = Callable[[str], None]


def grid(
    setting: Setting, progress: Progress, sizes: Sequence[tuple[int, int, int]] | None = None
) -> list[Curve]:
    """All contenders over sizes x densities x batch."""
    found = []
    for outputs, inputs, batch in sizes or (QUICK_GRID if setting.quick else GRID):
        progress(f"grid: {outputs} x {inputs}, batch {batch}")
        found.append(curves.measure(inputs, outputs, batch, DENSITIES, setting))
    return found


def layer(
    setting: Setting,
    outputs: int,
    inputs: int,
    density: float,
    batch: int,
    *,
    memory: bool,
    progress: Progress,
) -> dict[str, Any]:
    """The user's layer at its density, and at others for the break-even."""
    progress(f"layer {outputs} x {inputs}, batch {batch}")
    free, case = machine.available_memory(), Layer.of(inputs, outputs, density, batch)
    if free is not None and free < 100 * case.connections:  # what construction takes at its highest
        raise BenchError(
            f"--layer: {case.connections:,} connections need about "
            f"{100 * case.connections / 2**30:.3g} GiB, "
            f"and {free / 2**30:.3g} GiB are free: choose a lower --density"
        )
    densities = sorted(
        {density, *(d for d in DENSITIES if d > density or d == 0.5), min(1.0, 2 * density)}
    )
    kinds: Sequence[str] = LAYERS
    # weight, gradient, mask, product and a copy
    if free is not None and free < 20 * inputs * outputs:
        progress("a dense twin does not fit into the memory: rewire alone")
        densities, kinds = [density], [kind for kind in LAYERS if kind.startswith("rewire")]
    curve = curves.measure(inputs, outputs, batch, densities, setting, kinds)
    rows = []
    for kind in curve.kinds:
        row = {
            "kind": kind,
            "seconds": curve.seconds(kind, density),
            "speedup": None,
            "bytes": None,
        }
        if "dense" in curve.kinds:
            ratio = curve.ratio("dense", kind, density)
            row |= {"speedup": ratio.median, "low": ratio.low, "high": ratio.high}
        if memory:
            progress(f"memory of {kind}")
            row["bytes"] = setting.apart(
                "contender",
                kind=kind,
                inputs=inputs,
                outputs=outputs,
                connections=case.connections,
                batch=batch,
            )["bytes"]
        rows.append(row)
    return {"density": density, "rows": rows, "curve": curve.to_json()}


def model(
    setting: Setting,
    source: str,
    shape: Sequence[int] | None,
    density: float,
    batch: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Is sparse or dense faster, for each layer of a model at the rows that it sees, and up to
    which density? Equal layers are measured once.
    """
    made, shape = models.load(source, shape)
    if batch is None:
        batch = models.MODELS[source].batch if source in models.MODELS else 128
    measured: dict[Any, dict[str, Any]] = {}
    rows = []
    layers, others = models.layers(made, shape, batch)
    for name, found in layers:
        key = found.key
        if key not in measured:
            progress(f"{name}: {found.shown}")
            measured[key] = (_linear if found.is_linear else _conv)(setting, found, density)
        rows.append({"name": name, "layer": found.shown, "rows": found.rows} | measured[key])
    note = "only linear layers and 2-D convolutions are"
    for name, kind in others:
        rows.append(
            {"name": name, "layer": kind, "rows": "", "verdict": "not measured", "note": note}
        )
    return {
        "model": source,
        "density": density,
        "batch": batch,
        "input": list(shape),
        "layers": rows,
    }


def _verdict(dense: float, sparse: float, ratio: Ratio, density: float) -> dict[str, Any]:
    return {
        "verdict": "sparse" if ratio.median > 1 else "dense",
        "dense_seconds": dense,
        "sparse_seconds": sparse,
        "speedup": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "density": density,
        "note": "" if ratio.low > 1 or ratio.high < 1 else "about equal",
    }


def _linear(setting: Setting, found: models.Found, density: float) -> dict[str, Any]:
    densities = sorted({density, *BREAK_EVEN})
    kinds = ("dense", "onednn", "rewire")
    curve = curves.measure(found.inputs, found.outputs, found.rows, densities, setting, kinds)
    result = _verdict(
        curve.seconds("dense", density),
        curve.seconds("rewire", density),
        curve.ratio("dense", "rewire", density),
        density,
    )
    if "onednn" in curve.kinds:
        result["onednn_seconds"] = curve.seconds("onednn", density)
    return result | {"break_even": curve.break_even("dense")}


def _conv(setting: Setting, found: models.Found, density: float) -> dict[str, Any]:
    dense = found.module
    assert isinstance(dense, nn.Conv2d)
    x = torch.randn(found.rows, *found.shape[1:]).contiguous(memory_format=torch.channels_last)
    contenders = [
        Contender("dense", conv_step(dense, x.contiguous())),
        Contender("dense channels-last", conv_step(channels_last(dense), x)),
    ]
    densities = sorted({density, *BREAK_EVEN})
    for share in densities:
        try:
            sparse = SparseConv2d(
                dense.in_channels,
                dense.out_channels,
                dense.kernel_size,
                dense.stride,
                dense.padding,
                dense.dilation,
                dense.groups,
                dense.bias is not None,
                dense.padding_mode,
                density=share,
            )
        except (ValueError, NotImplementedError) as error:
            raise NotAvailable(str(error)) from None
        contenders.append(Contender(f"sparse @ {share:g}", conv_step(sparse, x)))
    timings = setting.contest(contenders)
    best = min(("dense", "dense channels-last"), key=timings.median)
    ratios = [timings.ratio(best, f"sparse @ {share:g}") for share in densities]
    mine = f"sparse @ {density:g}"
    return _verdict(
        timings.median(best), timings.median(mine), timings.ratio(best, mine), density
    ) | {"break_even": curves.break_even(densities, [ratio.median for ratio in ratios])}


def wide(
    setting: Setting, progress: Progress, data: str = "leukemia", batch: int = 2
) -> dict[str, Any]:
    """An epoch of the SET authors' network of 1.8 million neurons, on synthetic data of a published
    shape.

    Two thirds of the samples are trained on, as in their demonstration. They report 112 minutes an
    epoch on `lung`. A quick run has a twentieth of the neurons.
    """
    inputs, classes, samples = WIDE[data]
    hidden = [30_000 if setting.quick else 600_000] * 3
    progress(
        f"wide network: synthetic data of the shape of {data}, {inputs} inputs, "
        f"{3 * hidden[0]:,} hidden neurons"
    )
    start = time.perf_counter()
    try:
        got = setting.apart(
            "wide",
            inputs=inputs,
            classes=classes,
            samples=round(samples * 2 / 3),
            hidden=hidden,
            epsilon=20.0,
            batch=batch,
        )
    except NotAvailable as error:
        return {"data": data, "not_available": str(error)}
    return {
        "data": data,
        "batch": batch,
        "hidden": hidden,
        "seconds": time.perf_counter() - start,
    } | got

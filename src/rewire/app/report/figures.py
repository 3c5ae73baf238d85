"""The charts of the report, as plotly's JSON; the page sets colours of text and grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewire.app.report.read import Fan, Layer, Run

# Told apart by people with any colour vision, readable on white and on near-black.
COLOURS = ("#2f7fc1", "#e0762f", "#1d9a78", "#c0568f", "#8a6fd1", "#b58a1b", "#4aa5b8", "#a05a4a")
BARS = 40  # at most, in a histogram
PIXELS = 1 << 18  # at most, in a picture: a larger one would make the page slow


@dataclass(frozen=True)
class Figure:
    """A chart: heading, one sentence on how to read it, and plotly's data and layout."""

    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What the page's script draws."""
        return {"data": self.data, "layout": self.layout}


def _line(name: str, x: Sequence[float], y: Sequence[float], colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": colour, "width": 2},
        "marker": {"size": 6, "color": colour},
    }


def _axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    """Axis titles, with further settings as xaxis_... and yaxis_..."""
    axes: dict[str, Any] = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for key, value in more.items():
        axis, _, setting = key.partition("_")
        axes[axis][setting] = value
    return axes


def _epoch_axes(run: Run, y: str, **more: Any) -> dict[str, Any]:
    epochs = int(run.metrics[-1]["epoch"])
    step = max(1, math.ceil(epochs / 10))
    return _axes(
        "epoch", y, xaxis_dtick=step, xaxis_range=[1 - epochs * 0.03, epochs * 1.03], **more
    )


def layer_label(number: int, layer: Layer) -> str:
    """How the report calls a layer."""
    return f"layer {number} ({layer.inputs} → {layer.outputs})"


def _scores(run: Run, key: str, factor: float = 1) -> list[dict[str, Any]]:
    """Lines of a score over time, and a diamond for that of the test set."""
    epochs = [line["epoch"] for line in run.metrics]
    data = []
    for colour, part in zip(COLOURS, ("train", "validation"), strict=False):
        values = [line[f"{part}_{key}"] for line in run.metrics]
        if values[-1] is not None:
            name = part.replace("train", "training")
            data.append(_line(name, epochs, [factor * value for value in values], colour))
    if run.result is not None:
        value = [factor * run.result[f"test_{key}"]]
        data.append(_line("test", epochs[-1:], value, COLOURS[2]) | _diamond(COLOURS[2]))
    return data


def _diamond(colour: str) -> dict[str, Any]:
    return {"mode": "markers", "marker": {"size": 12, "symbol": "diamond", "color": colour}}


def score(run: Run) -> Figure:
    """Accuracy or R² over time, and the one test score."""
    if run.score == "r2":
        return Figure(
            "R²",
            "Share of the targets' variance that the outputs explain; the test set is scored once, "
            "at the end.",
            _scores(run, "r2"),
            _epoch_axes(run, "R²"),
        )
    return Figure(
        "Accuracy",
        "Training accuracy is the mean over the epoch; the test set is scored once, at the end.",
        _scores(run, "accuracy", 100),
        _epoch_axes(run, "accuracy (%)"),
    )


def loss(run: Run) -> Figure:
    """The loss over time."""
    what, unit = "cross-entropy", "cross-entropy (nats)"
    if run.score == "r2":
        what, unit = "squared error", "squared error (of standardised targets)"
    return Figure(
        "Loss",
        f"Mean {what}, without any term that the method adds.",
        _scores(run, "loss"),
        _epoch_axes(run, unit, yaxis_rangemode="tozero"),
    )


def turnover(run: Run) -> Figure:
    """Share of each layer's connections replaced in each epoch."""
    epochs = [line["epoch"] for line in run.metrics]
    data = [
        _line(
            layer_label(i + 1, layer),
            epochs,
            [100 * m["turnover"][i] for m in run.metrics],
            COLOURS[i % len(COLOURS)],
        )
        for i, layer in enumerate(run.layers)
    ]
    return Figure(
        "Turnover",
        "Connections grown in an epoch, as a share of the layer's. Above 100 %, some places were "
        "filled more than once.",
        data,
        _epoch_axes(run, "turnover (% per epoch)", yaxis_rangemode="tozero", yaxis_tickformat=","),
    )


def _layer_lines(
    run: Run, key: str, start: Sequence[int], end: Sequence[int | None] | None
) -> list[dict[str, Any]]:
    """A line for each layer from epoch 0, and a diamond where the end differs from it."""
    epochs = [0, *(line["epoch"] for line in run.metrics)]
    data = []
    for i, entry in enumerate(run.info["layers"]):
        colour, label = (
            COLOURS[i % len(COLOURS)],
            (f"layer {i + 1} ({entry['inputs']} → {entry['outputs']})"),
        )
        data.append(_line(label, epochs, [start[i], *(m[key][i] for m in run.metrics)], colour))
        last = None if end is None else end[i]
        if last is not None and last != run.metrics[-1][key][i]:
            name = f"layer {i + 1} at the end"
            hidden = {"showlegend": False, "cliponaxis": False}
            data.append(_line(name, epochs[-1:], [last], colour) | _diamond(colour) | hidden)
    return data


def _falling_axes(run: Run, y: str, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """From epoch 0; logarithmic where the lines are too far apart to be seen otherwise."""
    values = [value for line in data for value in line["y"]]
    if 0 < min(values) < max(values) / 100:
        exponents = math.floor(math.log10(min(values))), math.log10(max(values)) + 0.1
        more: dict[str, Any] = {
            "yaxis_type": "log",
            "yaxis_range": list(exponents),
            "yaxis_dtick": 1,
        }
    else:
        more = {"yaxis_rangemode": "tozero"}
    axes = _epoch_axes(run, y, yaxis_tickformat=",", **more)
    epochs = int(run.metrics[-1]["epoch"])
    axes["xaxis"]["range"] = [-0.03 * epochs, 1.03 * epochs]
    return axes


def _final(run: Run, key: str) -> list[int | None] | None:
    """A number of each finished weight, as far as it is known; None before the end, or if the
    network kept its size.
    """
    if run.result is None or not run.after:
        return None
    found = {f"{layer['name']}.weight": int(layer[key]) for layer in run.after["layers"]}
    return [found.get(layer["name"]) for layer in run.info["layers"]]


def active(run: Run) -> Figure:
    """Number of connections over time."""
    start = [layer["connections"] for layer in run.info["layers"]]
    note = (
        "A level line: the layer keeps its budget. A falling line: the method removes connections."
    )
    lines = _layer_lines(run, "connections", start, _final(run, "connections"))
    return _over_time(run, "Active connections", "connections", note, lines)


def units(run: Run) -> Figure | None:
    """Units of every layer over time; None for runs that did not count them."""
    if not all(len(line.get("units") or ()) == len(run.info["layers"]) for line in run.metrics):
        return None
    start = [layer["outputs"] for layer in run.info["layers"]]
    note = "Units that take part: with connections in and out (in the last layer, in)."
    lines = _layer_lines(run, "units", start, _final(run, "active_units"))
    return _over_time(run, "Active units", "units", note, lines)


def _over_time(run: Run, title: str, what: str, note: str, lines: list[dict[str, Any]]) -> Figure:
    if any(line["mode"] == "markers" for line in lines):
        note += " A diamond: what is left after training."
    return Figure(title, note, lines, _falling_axes(run, what, lines))


def _histogram(title: str, note: str, fan: Fan, x: str, y: str, colour: str) -> Figure:
    low, high = fan.low, fan.high
    width = max(1, math.ceil((high - low + 1) / BARS))
    edges = np.arange(low, high + width + 1, width)
    heights, _ = np.histogram(fan.counts, bins=edges)
    if fan.unused:
        heights[0] += fan.unused  # low is 0 then
    centres = edges[:-1] + (width - 1) / 2
    spans = [str(e) if width == 1 else f"{e} to {e + width - 1}" for e in edges[:-1].tolist()]
    bars = {
        "type": "bar",
        "x": centres.tolist(),
        "y": heights.tolist(),
        "customdata": spans,
        "width": width * 0.9,
        "marker": {"color": colour},
        "hovertemplate": "%{customdata} connections: %{y}<extra></extra>",
    }
    layout = _axes(x, y)
    layout["showlegend"] = False
    if high - low < 10:
        layout["xaxis"]["dtick"] = 1
    if heights.max() < 6:
        layout["yaxis"]["dtick"] = 1  # counts are whole numbers
    return Figure(title, note, [bars], layout)


def fans(run: Run) -> list[Figure]:
    """Fan-in and fan-out of every sparse layer."""
    figures = []
    for i, layer in enumerate(run.layers):
        if layer.fan_in is None or layer.fan_out is None:
            continue
        colour = COLOURS[i % len(COLOURS)]
        label = layer_label(i + 1, layer)
        for kind, fan, unit in (
            ("Fan-in", layer.fan_in, "outputs"),
            ("Fan-out", layer.fan_out, "inputs"),
        ):
            note = (
                f"Mean {fan.mean:.1f}, largest {fan.high}; {fan.unused} of {fan.size} "
                f"{unit} "
                "have none."
            )
            x = f"connections of one {unit[:-1]} ({kind.lower()})"
            figures.append(
                _histogram(f"{kind}, {label}", note, fan, x, f"number of {unit}", colour)
            )
    return figures


def pixels(run: Run) -> Figure | None:
    """Connections of every pixel, as an image; None if the inputs are no image."""
    shape = run.info.get("image_shape")
    if not shape or len(shape) > 3 or not run.layers or math.prod(shape) != run.layers[0].inputs:
        return None
    fan = run.layers[0].fan_out
    if fan is None or fan.size > PIXELS:
        return None
    # the colours of a pixel together
    counts = fan.all().reshape(-1, *shape[-2:]).sum(0)
    data = {
        "type": "heatmap",
        "z": counts.tolist(),
        "colorscale": "Viridis",
        "zmin": 0,
        "zmax": max(1, int(counts.max())),
        "colorbar": {"title": {"text": "connections", "side": "right"}, "thickness": 14},
        "hovertemplate": "row %{y}, column %{x}: %{z} connections<extra></extra>",
    }
    layout = _axes(
        "column (pixels)", "row (pixels)", yaxis_autorange="reversed", yaxis_scaleanchor="x"
    )
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {"constrain": "domain", "showgrid": False, "zeroline": False}
    return Figure(
        "Where the network looks",
        f"How many connections lead from each pixel into the first layer; "
        f"{int((counts == 0).sum())} of {counts.size} pixels have none.",
        [data],
        layout | {"height": 460},
    )

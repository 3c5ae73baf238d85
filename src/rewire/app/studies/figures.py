"""The charts of a study, as plotly's JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rewire.app.report.figures import COLOURS, Figure
from rewire.app.studies.statistics import Row

__all__ = [
    "Look",
    "accuracy",
    "against",
    "calibration",
    "degrees",
    "expected_error",
    "over_time",
    "pictures",
]

_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross")


class Look:
    """Colour, dash and symbol of each method, the same in all charts of a page."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.places = {label: place for place, label in enumerate(dict.fromkeys(labels))}

    def of(self, row: Row) -> dict[str, Any]:
        """Line and marker."""
        place = self.places[row.cell.entry.label]
        colour, turn = COLOURS[place % len(COLOURS)], place // len(COLOURS)
        return {
            "line": {"color": colour, "width": 2, "dash": _DASHES[turn % len(_DASHES)]},
            "marker": {"color": colour, "size": 8, "symbol": _SYMBOLS[place % len(_SYMBOLS)]},
        }


def _axes(x: str, y: str, **more: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}, **more.get("xaxis", {})},
        "yaxis": {"title": {"text": y}, **more.get("yaxis", {})},
    }


def _percent(row: Row) -> float:
    return 100 * (row.mean or 0.0)


def _spread(rows: Sequence[Row]) -> dict[str, Any]:
    return {"type": "data", "array": [100 * (row.spread or 0.0) for row in rows]}


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.scores:
            found.setdefault(row.cell.entry.label, []).append(row)
    return found


def left(row: Row) -> float:
    """Percent of the connections: the budget, or what a method without one left."""
    if row.cell.density is not None:
        return 100 * row.cell.density
    return 100 * (row.number("connections") or 0.0) / max(row.possible, 1)


def _log_ticks(rows: Sequence[Row]) -> dict[str, Any]:
    """A logarithmic axis with the densities of the study on it."""
    budgets = sorted({100 * row.cell.density for row in rows if row.cell.density is not None})
    axis: dict[str, Any] = {"type": "log"}
    if 0 < len(budgets) <= 12:
        axis |= {"tickvals": budgets, "ticktext": [f"{value:g}" for value in budgets]}
    return axis


def accuracy(rows: Sequence[Row], look: Look) -> Figure:
    """Accuracy against density, a line a method; without a budget a point."""
    data = []
    for label, group in _by_method(rows).items():
        group = sorted(group, key=left)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(group) > 1 else "markers",
                "name": label,
                "x": [left(row) for row in group],
                "y": [_percent(row) for row in group],
                "error_y": _spread(group) | {"thickness": 1, "width": 4},
                "hovertemplate": "%{x:.4g} % of the connections<br>%{y:.2f} ± "
                "%{error_y.array:.2f} %<extra>" + label + "</extra>",
                **look.of(group[0]),
            }
        )
    return Figure(
        "Accuracy against density",
        "On the test set, mean over seeds; bars are one standard deviation up and down.",
        data,
        _axes("density (% of the connections)", "accuracy (%)", xaxis=_log_ticks(rows))
        | {"height": 420},
    )


def against(
    rows: Sequence[Row], look: Look, what: str, title: str, unit: str, factor: float
) -> Figure:
    """Accuracy against a measured number, a point a row."""
    data = []
    for label, group in _by_method(rows).items():
        known = [row for row in group if row.number(what) is not None]
        if not known:
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": [factor * (row.number(what) or 0.0) for row in known],
                "y": [_percent(row) for row in known],
                "customdata": [f"{left(row):.3g} %" for row in known],
                "hovertemplate": "%{customdata} of the connections<br>%{x:.4g} "
                + unit
                + "<br>%{y:.2f} %<extra>"
                + label
                + "</extra>",
                **look.of(known[0]),
            }
        )
    return Figure(
        f"Accuracy against {title}",
        "Measured, mean over seeds; a point for each method and density.",
        data,
        _axes(f"{title} ({unit})", "accuracy (%)", xaxis={"type": "log"}),
    )


def _mean_curve(row: Row, name: str) -> tuple[list[float], list[float]]:
    """Epochs and the mean over seeds of a curve, where all seeds have it."""
    curves = [outcome["curves"] for outcome in row.outcomes.values()]
    together = zip(*(zip(c["epoch"], c[name], strict=True) for c in curves), strict=False)
    points = [
        (values[0][0], statistics.fmean(value for _, value in values))
        for values in together
        if all(value is not None for _, value in values)
    ]
    return [x for x, _ in points], [y for _, y in points]


def over_time(
    rows: Sequence[Row], look: Look, name: str, title: str, note: str, axis: str
) -> Figure | None:
    """A share over epochs, a line a method; None where no row has it."""
    data = []
    for row in rows:
        if not row.outcomes:
            continue
        x, y = _mean_curve(row, name)
        if x:
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines" if len(x) > 20 else "lines+markers",
                    "name": row.cell.entry.label,
                    "x": x,
                    "y": [100 * value for value in y],
                    **look.of(row),
                }
            )
    if not data:
        return None
    step = max(1, round(max(trace["x"][-1] for trace in data) / 10))
    axes = _axes("epoch", axis, xaxis={"dtick": step}, yaxis={"rangemode": "tozero"})
    return Figure(title, note, data, axes)


def _spread_out(row: Row, kind: str) -> tuple[list[float], list[float]]:
    """Degrees of the first sparse weight and the share of units that have each, over all seeds."""
    parts = [outcome["degrees"][0][kind] for outcome in row.outcomes.values() if outcome["degrees"]]
    if not parts:
        return [], []
    width = max(part["width"] for part in parts)
    counted: dict[int, int] = {}
    for part in parts:
        for place, units in enumerate(part["units"]):
            bucket = place * part["width"] // width
            counted[bucket] = counted.get(bucket, 0) + units
    total = sum(counted.values())
    places = range(max(counted) + 1)
    middle = (width - 1) / 2
    return (
        [place * width + middle for place in places],
        [100 * counted.get(place, 0) / total for place in places],
    )


def degrees(rows: Sequence[Row], look: Look, kind: str) -> Figure | None:
    """How connections are spread over the units of the first layer."""
    unit = "inputs" if kind == "out" else "outputs"
    data = []
    for row in rows:
        x, y = _spread_out(row, kind)
        if x:
            trace = {
                "type": "scatter",
                "mode": "lines",
                "name": row.cell.entry.label,
                "x": x,
                "y": y,
            }
            data.append({**trace, **look.of(row), "line": look.of(row)["line"] | {"shape": "hvh"}})
    if not data:
        return None
    return Figure(
        f"Fan-{kind} of the first layer",
        f"Share of its {unit} by their number of connections, over all seeds.",
        data,
        _axes(f"connections of one of the {unit}", f"{unit} (%)"),
    )


def pictures(rows: Sequence[Row]) -> list[Figure]:
    """Which pixels each method reads, mean over seeds, on one scale."""
    found: list[tuple[Row, list[list[float]]]] = []
    for row in rows:
        parts = [outcome["picture"] for outcome in row.outcomes.values() if outcome.get("picture")]
        if parts:
            height, width = parts[0]["shape"]
            mean = [
                round(statistics.fmean(v), 2)
                for v in zip(*(p["counts"] for p in parts), strict=True)
            ]
            found.append((row, [mean[i * width : (i + 1) * width] for i in range(height)]))
    top = max((value for _, lines in found for line in lines for value in line), default=1.0)
    square = {"constrain": "domain", "showgrid": False, "zeroline": False}
    layout = _axes(
        "column (pixels)",
        "row (pixels)",
        xaxis=square,
        yaxis=square | {"autorange": "reversed", "scaleanchor": "x"},
    )
    return [
        Figure(
            row.cell.entry.label,
            f"{sum(value == 0 for line in lines for value in line)} of "
            f"{sum(map(len, lines))} pixels are read with no seed.",
            [
                {
                    "type": "heatmap",
                    "z": lines,
                    "colorscale": "Viridis",
                    "zmin": 0,
                    "zmax": top,
                    "colorbar": {
                        "thickness": 10,
                        "title": {"text": "connections", "side": "right"},
                    },
                    "hovertemplate": "row %{y}, column %{x}: %{z} connections<extra></extra>",
                }
            ],
            layout,
        )
        for row, lines in found
    ]


def _bins(row: Row) -> list[list[float]] | None:
    """Bins of confidence, summed over seeds."""
    parts = [outcome.get("calibration") for outcome in row.outcomes.values()]
    known = [part for part in parts if part]
    if not known or len(known) < len(parts):
        return None
    return [[sum(v) for v in zip(*bins, strict=True)] for bins in zip(*known, strict=True)]


def expected_error(row: Row) -> float | None:
    """Expected calibration error, in percent: the gap between confidence and share of right
    answers, mean over test samples.
    """
    bins = _bins(row)
    if bins is None:
        return None
    samples = sum(count for count, _, _ in bins)
    return 100 * sum(abs(confidence - right) for _, confidence, right in bins) / samples


def calibration(rows: Sequence[Row], look: Look) -> Figure | None:
    """How often answers of a confidence are right."""
    data: list[dict[str, Any]] = []
    for row in rows:
        bins = [b for b in _bins(row) or () if b[0]]
        if bins:
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": row.cell.entry.label,
                    "x": [100 * confidence / count for count, confidence, _ in bins],
                    "y": [100 * right / count for count, _, right in bins],
                    "customdata": [count for count, _, _ in bins],
                    "hovertemplate": "%{x:.1f} % sure, %{y:.1f} % right<br>%{customdata} "
                    "answers<extra>" + row.cell.entry.label + "</extra>",
                    **look.of(row),
                }
            )
    if not data:
        return None
    ideal = {"type": "scatter", "mode": "lines", "name": "as sure as right", "x": [0, 100]}
    data.append(ideal | {"y": [0, 100], "line": {"color": "#888888", "width": 1, "dash": "dot"}})
    return Figure(
        "Calibration",
        "Share of right answers by confidence, on the test sets of all seeds; below the dotted "
        "line a network is too sure of itself.",
        data,
        _axes("confidence (%)", "right (%)"),
    )

"""The picture of a run: one self-contained HTML page with charts, and the targets' verdicts."""

from __future__ import annotations

from html import escape
from typing import Any

from rewire.app.bench import tables
from rewire.app.bench.tables import Sheet
from rewire.app.report.comparison import plain_table
from rewire.app.report.figures import COLOURS, Figure
from rewire.app.report.page import assemble, grid

__all__ = ["render"]


def render(results: dict[str, Any]) -> str:
    """The page for the results of a run."""
    drawn: dict[str, Figure] = {}
    m, others, targets = results["machine"], results["others"], results["targets"]
    parts = [
        "<h1>rewire bench</h1>",
        f'<p class="soft">{escape(tables.machine(m))}; {escape(str(m["started"]))}</p>',
        f'<p class="soft">{escape(tables.ceilings(results["ceilings"]))}</p>',
    ]
    warnings = [tables.CPU_TIME] if results["setting"]["cpu_time"] else []
    if others is not None and others > tables.BUSY:
        warnings.append(tables.disturbance(others))
    parts += [f'<p class="state">{escape(w[0].upper() + w[1:])}.</p>' for w in warnings]
    if results["earlier"]:
        parts.append("<h2>What changed</h2>" + _section(Sheet(**results["earlier"])))
    if targets:
        parts.append("<h2>Performance targets</h2>" + grid([_margins(targets)], drawn))
        parts += [_section(tables.target(result)) for result in targets]
        parts += [grid(_lines(r["data"]), drawn) for r in targets if "points" in r["data"]]
    curves = results["grid"] + ([results["layer"]["curve"]] if results["layer"] else [])
    if curves:
        parts.append("<h2>Speed over density</h2>" + grid([_curve(c) for c in curves], drawn))
    if results["layer"]:
        parts.append("<h2>The layer</h2>" + _section(tables.layer(results["layer"])))
    if results["model"]:
        parts.append("<h2>The model</h2>" + _section(tables.model(results["model"])))
    if results["wide"]:
        parts.append(f"<h2>Wide network</h2><p>{escape(tables.wide(results['wide']))}</p>")
    return assemble("rewire bench", "\n".join(parts), drawn)


def _section(sheet: Sheet) -> str:
    """A table with its heading."""
    return f'<h3 class="gap">{escape(sheet.title)}</h3><p class="soft">{escape(sheet.note)}</p>' + (
        plain_table(sheet.columns, sheet.rows, tables.WORDS) if sheet.rows else ""
    )


def _margins(results: list[dict[str, Any]]) -> Figure:
    """Every figure with a target as a dot: how many times better than its target."""
    data = []
    for met in (True, False):
        dots = [
            (f["margin"], r["name"].upper(), tables.figure_line(f))
            for r in results
            for f in r["figures"]
            if f["met"] is met and f["margin"]
        ]
        x, y, text = zip(*dots, strict=True) if dots else ((), (), ())
        marker = {"size": 9, "color": COLOURS[2 if met else 1], "symbol": "circle" if met else "x"}
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "met" if met else "missed",
                "x": x,
                "y": y,
                "text": text,
                "marker": marker,
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    line = {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper"}
    order = [r["name"].upper() for r in reversed(results)]
    return Figure(
        "Figures against their targets",
        "A dot right of the line is a target that was met. Point at it to read the figure.",
        data,
        {
            "xaxis": {"title": {"text": "times better than the target"}, "type": "log"},
            "yaxis": {"categoryorder": "array", "categoryarray": order},
            "shapes": [line | {"line": {"dash": "dot", "width": 1}}],
        },
    )


def _scatter(name: str, x: list[float], y: list[float], i: int, dash: str = "solid") -> Any:
    line = {"color": COLOURS[i % len(COLOURS)], "dash": dash}
    return {"type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": y, "line": line}


def _axes(x: str, y: str) -> dict[str, Any]:
    """Logarithmic axes with these titles."""
    return {
        axis: {"title": {"text": title}, "type": "log"}
        for axis, title in (("xaxis", x), ("yaxis", y))
    }


def _dash(times: list[float]) -> str:
    """Dots for a way that takes equally long at every density."""
    return "dot" if len(set(times)) == 1 else "solid"


def _curve(c: dict[str, Any]) -> Figure:
    percent = [100 * d for d in c["densities"]]
    data = [
        _scatter(
            kind, percent, [1e3 * s for s in times], i, "dot" if len({*times}) == 1 else "solid"
        )
        for i, (kind, times) in enumerate(c["seconds"].items())
    ]
    return Figure(
        f"{c['outputs']} x {c['inputs']}, batch {c['batch']}",
        "Medians; lower is faster.",
        data,
        _axes("density (%)", "forward + backward (ms)"),
    )


def _lines(data: dict[str, Any]) -> list[Figure]:
    """P10: time and memory over connections."""
    points = data["points"]
    k = [p["connections"] for p in points]
    size = f"{data['size']:,} x {data['size']:,}, batch {data['batch']}"
    note = "A straight line of slope 1 where the connections decide."
    return [
        Figure(
            f"{what}, {size}",
            note,
            [_scatter("", k, [factor * p[key] for p in points], i)],
            _axes("connections", unit) | {"showlegend": False},
        )
        for i, (what, unit, key, factor) in enumerate(
            (
                ("Step time", "step (ms)", "seconds", 1e3),
                ("Memory", "memory over the empty process (MiB)", "bytes", 2**-20),
            )
        )
    ]

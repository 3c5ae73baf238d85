"""The picture of a run: one self-contained HTML page with the charts and the bars' verdicts."""

from __future__ import annotations

from html import escape
from typing import Any

from rewire.app.bench import tables
from rewire.app.report.figures import COLOURS, Figure
from rewire.app.report.page import assemble, grid

__all__ = ["render"]


def render(results: dict[str, Any]) -> str:
    """The page for the results of a run."""
    drawn: dict[str, Figure] = {}
    m = results["machine"]
    parts = [
        "<h1>rewire bench</h1>",
        f'<p class="soft">{escape(tables.machine(m))}; {escape(str(m["started"]))}</p>',
    ]
    if results["setting"]["cpu_time"]:
        parts.append(f'<p class="state">{escape(tables.CPU_TIME)}.</p>')
    others = results["others"]
    if others is not None and others > tables.BUSY:
        parts.append(
            f'<p class="state">Other programs took {others:.0%} of the machine: figures '
            "are preliminary.</p>"
        )
    if results["bars"]:
        parts.append("<h2>Bars</h2>" + grid([_margins(results["bars"])], drawn))
        parts += [_bar(result) for result in results["bars"]]
        parts += [grid(_lines(r["data"]), drawn) for r in results["bars"] if "points" in r["data"]]
    curves = list(results["grid"]) + ([results["layer"]["curve"]] if results["layer"] else [])
    if curves:
        parts.append("<h2>Speed over density</h2>" + grid([_curve(c) for c in curves], drawn))
    if results["layer"]:
        parts.append("<h2>The layer</h2>" + _layer(results["layer"]))
    if results["model"]:
        parts.append("<h2>The model</h2>" + _model(results["model"]))
    if results["wide"]:
        parts.append(f"<h2>Wide network</h2><p>{escape(tables.wide(results['wide']))}</p>")
    return assemble("rewire bench", "\n".join(parts), drawn)


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _bar(result: dict[str, Any]) -> str:
    rows = []
    for f in result["figures"]:
        limit = "" if f["bar"] is None else f"{f['sense']} {tables.number(f['bar'], f['unit'])}"
        verdict = {True: "met", False: "missed", None: ""}[f["met"]]
        around = (
            "" if f["low"] is None else (f"{tables.number(f['low'])} to {tables.number(f['high'])}")
        )
        rows.append(
            [f["name"], tables.number(f["value"], f["unit"]), around, limit, verdict, f["note"]]
        )
    state = result["status"] + (f": {result['reason']}" if result["reason"] else "")
    busy = (
        "" if result["others"] is None else (f", others took {result['others']:.0%} of the machine")
    )
    head = f"<h3>{escape(result['name'].upper())}: {escape(result['title'])}</h3>"
    table = _table(["figure", "measured", "quartiles", "bar", "", "note"], rows) if rows else ""
    return f'{head}<p class="soft">{escape(state + busy)}</p>{table}'


def _layer(found: dict[str, Any]) -> str:
    rows = [
        [
            r["kind"],
            tables.duration(r["seconds"]),
            tables.speedup(r),
            "" if r["bytes"] is None else f"{r['bytes'] / 2**20:,.1f} MiB",
        ]
        for r in found["rows"]
    ]
    return _table(
        [f"density {found['density']:g}", "forward + backward", "over nn.Linear", "memory"], rows
    )


def _model(found: dict[str, Any]) -> str:
    rows = []
    for r in found["layers"]:
        known = "speedup" in r
        rows.append(
            [
                r["name"],
                r["layer"],
                str(r["rows"]),
                tables.duration(r["dense_seconds"]) if known else "",
                tables.duration(r["sparse_seconds"]) if known else "",
                f"{r['speedup']:.3g} x" if known else "",
                r["verdict"] + (f" ({r['note']})" if r["note"] else ""),
            ]
        )
    head = ["layer", "what", "rows", "dense", "sparse", "dense / sparse", "faster here"]
    return (
        f'<p class="soft">{escape(found["model"])}, density {found["density"]:g}, batch '
        f"{found['batch']}</p>" + _table(head, rows)
    )


def _margins(results: list[dict[str, Any]]) -> Figure:
    """Every barred figure as a dot: how many times better than its bar."""
    dots: dict[bool, tuple[list[float], list[str], list[str]]] = {
        True: ([], [], []),
        False: ([], [], []),
    }
    for r in results:
        for f in r["figures"]:
            if f["met"] is None or not f["bar"] or not f["value"] or min(f["bar"], f["value"]) <= 0:
                continue
            margin = f["value"] / f["bar"] if f["sense"] == ">=" else f["bar"] / f["value"]
            x, y, text = dots[f["met"]]
            x.append(margin)
            y.append(r["name"].upper())
            text.append(
                f"{f['name']}: {tables.number(f['value'], f['unit'])} ({f['sense']} "
                f"{tables.number(f['bar'])})"
            )
    order = [r["name"].upper() for r in reversed(results)]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "met" if met else "missed",
            "x": x,
            "y": y,
            "text": text,
            "marker": {
                "size": 9,
                "color": COLOURS[2 if met else 1],
                "symbol": "circle" if met else "x",
            },
            "hovertemplate": "%{text}<extra></extra>",
        }
        for met, (x, y, text) in dots.items()
    ]
    layout = {
        "xaxis": {"title": {"text": "times better than the bar"}, "type": "log"},
        "yaxis": {"categoryorder": "array", "categoryarray": order},
        "shapes": [
            {
                "type": "line",
                "x0": 1,
                "x1": 1,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"dash": "dot", "width": 1},
            }
        ],
    }
    return Figure(
        "Figures against their bars",
        "Right of the line: met. Point at a dot for its figure.",
        data,
        layout,
    )


def _scatter(
    name: str, x: list[float], y: list[float], number: int, dash: str = "solid"
) -> dict[str, Any]:
    colour = COLOURS[number % len(COLOURS)]
    line = {"color": colour, "dash": dash}
    return {"type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": y, "line": line}


def _curve(c: dict[str, Any]) -> Figure:
    percent = [100 * d for d in c["densities"]]
    data = [
        _scatter(
            kind,
            percent,
            [1e3 * s for s in seconds],
            i,
            "dot" if len(set(seconds)) == 1 else "solid",
        )
        for i, (kind, seconds) in enumerate(c["seconds"].items())
    ]
    layout = {
        "xaxis": {"title": {"text": "density (%)"}, "type": "log"},
        "yaxis": {"title": {"text": "forward + backward (ms)"}, "type": "log"},
    }
    return Figure(
        f"{c['outputs']} x {c['inputs']}, batch {c['batch']}",
        "Medians; lower is faster.",
        data,
        layout,
    )


def _lines(data: dict[str, Any]) -> list[Figure]:
    """P10: time and memory over connections."""
    points = data["points"]
    k = [p["connections"] for p in points]
    size = f"{data['size']:,} x {data['size']:,}, batch {data['batch']}"
    axis = {"title": {"text": "connections"}, "type": "log"}
    figures = []
    for title, unit, values, i in (
        (f"Step time, {size}", "step (ms)", [1e3 * p["seconds"] for p in points], 0),
        (
            f"Memory, {size}",
            "memory over the empty process (MiB)",
            [p["bytes"] / 2**20 for p in points],
            2,
        ),
    ):
        layout = {
            "xaxis": axis,
            "yaxis": {"title": {"text": unit}, "type": "log"},
            "showlegend": False,
        }
        figures.append(
            Figure(
                title,
                "A straight line of slope 1 where connections rule.",
                [_scatter("", k, values, i)],
                layout,
            )
        )
    return figures

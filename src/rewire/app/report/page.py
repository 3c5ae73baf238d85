"""The report of a run: one HTML page that needs nothing but a browser."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from rewire.app.report import comparison, figures
from rewire.app.report.figures import Figure
from rewire.app.report.read import Run, read_run
from rewire.storage.files import write_atomic

REPORT = "report.html"
#: The chart library: the bundle that plotly publishes as plotly.js-cartesian-dist-min, compressed.
PLOTLY = "plotly/plotly-cartesian.min.js.gz"


def write(folder: Path) -> Path:
    """Make `report.html` of the run in `folder`, finished or not, and return its path."""
    path = folder / REPORT
    page = render(read_run(folder)).encode(
        "utf-8", "replace"
    )  # the folder's name may be no valid UTF-8
    try:
        write_atomic(path, page)
    # a run that was resumed meanwhile removed our temporary file as a leftover
    except FileNotFoundError:
        write_atomic(path, page)
    return path


def render(run: Run) -> str:
    """The page."""
    drawn: dict[str, Figure] = {}
    body = "\n".join(_sections(run, drawn))
    return assemble(f"{run.name}: {run.config.get('method')} on {run.data}", body, drawn)


def assemble(title: str, body: str, drawn: Mapping[str, Figure]) -> str:
    """A self-contained page of HTML `body`; charts are drawn in the elements of their names."""
    own = resources.files("rewire.app.report")
    charts = json.dumps({name: figure.to_json() for name, figure in drawn.items()}, allow_nan=False)
    texts = {
        "@TITLE@": escape(title),
        "@CSS@": (own / "page.css").read_text("utf-8"),
        "@BODY@": body,
        # nothing in the data may end the script element
        "@FIGURES@": charts.replace("<", "\\u003c"),
        "@PLOTLY@": base64.b64encode((own / PLOTLY).read_bytes()).decode(),
    }
    # All in one pass: what is put in may hold such marks itself.
    return re.sub(
        "|".join(texts), lambda found: texts[found[0]], (own / "page.html").read_text("utf-8")
    )


def _sections(run: Run, drawn: dict[str, Figure]) -> list[str]:
    config = run.config
    parts = [
        f"<h1>{escape(str(config.get('method')))} on {escape(run.data)}</h1>",
        f'<p class="soft">run {escape(run.name)}, seed {escape(str(config.get("seed")))}</p>',
    ]
    if run.result is None:
        done, epochs = len(run.metrics), config.get("epochs")
        parts.append(
            f'<p class="state">This run is not finished: {done} of {epochs} epochs. There is no '
            "test score yet.</p>"
        )
    parts.append(_tiles(run))
    if run.metrics:
        parts.append("<h2>Training</h2>")
        parts.append(grid([figures.score(run), figures.loss(run)], drawn))
        parts.append(f"<h2>{'Units and connections' if _shrinks(run) else 'Rewiring'}</h2>")
        parts.append(grid(_changes(run), drawn))
    if run.before and run.after and run.inference:
        parts.append("<h2>Before and after</h2>")
        parts.append(comparison.table(run))
        parts.append('<h3 class="gap">Layer by layer</h3>')
        parts.append(comparison.layer_table(run))
    sparse = any(layer.fan_in is not None for layer in run.layers)
    parts.append("<h2>Topology</h2>" if sparse else "<h2>Layers</h2>")
    parts.append(_layer_table(run))
    picture = figures.pixels(run)
    if picture is not None:
        parts.append("<h2>Inputs</h2>" + _card(picture, drawn, "card wide"))
    if fans := figures.fans(run):
        parts.append("<h2>Fan-in and fan-out</h2>")
        parts.append(grid(fans, drawn))
    parts.append("<h2>Options</h2>" + _pairs(_options(config)))
    if run.result is not None:
        parts.append("<h2>Versions</h2>" + _pairs(run.result["versions"]))
    return parts


def _shrinks(run: Run) -> bool:
    """Whether the run is of a method that leaves less than it began with."""
    fewer = any(
        layer.get("budget", layer["connections"]) < layer["connections"]
        for layer in run.info["layers"]
    )
    return bool(run.info.get("starts_dense")) or fewer or bool(run.before)


def _changes(run: Run) -> list[Figure]:
    """How the network changed; turnover where there was any, or nothing else to see."""
    charts = []
    if not _shrinks(run) or any(any(line["turnover"]) for line in run.metrics):
        charts.append(figures.turnover(run))
    units = figures.units(run) if _shrinks(run) else None
    return [*([units] if units is not None else []), figures.active(run), *charts]


def _tiles(run: Run) -> str:
    connections = sum(layer.connections for layer in run.layers)
    possible = sum(layer["inputs"] * layer["outputs"] for layer in run.info["layers"])
    tiles = []
    if run.result is not None:
        samples = run.info["samples"]["test"]
        value = _score(run, run.result[f"test_{run.score}"])
        tiles.append((value, f"test {_score_name(run)}, {samples:,} samples"))
    tiles.append((f"{connections:,}", f"connections of {possible:,}"))
    tiles.append((f"{connections / possible:.2%}", "density"))
    if run.metrics and (last := run.metrics[-1][f"validation_{run.score}"]) is not None:
        tiles.append((_score(run, last), f"validation {_score_name(run)}, last epoch"))
    if run.result is not None:
        tiles.append(
            (_duration(run.result["seconds"]), f"training time, {run.result['steps']:,} steps")
        )
    return _boxes(tiles) + (
        _boxes(comparison.tiles(run)) if run.before and run.after and run.inference else ""
    )


def _score_name(run: Run) -> str:
    return "R²" if run.score == "r2" else "accuracy"


def _score(run: Run, value: float) -> str:
    return f"{value:.4f}" if run.score == "r2" else f"{value:.2%}"


def _boxes(tiles: Sequence[tuple[str, str]]) -> str:
    boxes = (
        f'<div class="tile"><b>{escape(a)}</b><span class="soft">{escape(b)}</span></div>'
        for a, b in tiles
    )
    return f'<div class="tiles">{"".join(boxes)}</div>'


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def grid(charts: Sequence[Figure], drawn: dict[str, Figure], *, small: bool = False) -> str:
    """Charts side by side, entered into `drawn`."""
    kind = "grid small" if small else "grid"
    return f'<div class="{kind}">{"".join(_card(chart, drawn) for chart in charts)}</div>'


def _card(chart: Figure, drawn: dict[str, Figure], kind: str = "card") -> str:
    name = f"figure-{len(drawn) + 1}"
    drawn[name] = chart
    height = chart.layout.get("height")
    style = f' style="height:auto;min-height:{min(height, 360)}px"' if height else ""
    return (
        f'<section class="{kind}"><h3>{escape(chart.title)}</h3><p '
        f'class="soft">{escape(chart.note)}</p>'
        f'<div class="chart" id="{name}"{style}></div></section>'
    )


def _layer_table(run: Run) -> str:
    head = [
        "layer",
        "connections",
        "possible",
        "density",
        "mean fan-in",
        "inputs unused",
        "outputs unused",
    ]
    if all(layer.fan_in is None for layer in run.layers):
        head = head[:4]
    rows = []
    for i, layer in enumerate(run.layers, start=1):
        possible = layer.inputs * layer.outputs
        numbers = [
            f"{layer.connections:,}",
            f"{possible:,}",
            f"{layer.connections / max(possible, 1):.2%}",
        ]
        if layer.fan_in is not None and layer.fan_out is not None:
            numbers += [
                f"{layer.fan_in.mean:.1f}",
                f"{layer.fan_out.unused:,}",
                f"{layer.fan_in.unused:,}",
            ]
        elif len(head) > 4:
            numbers += ["dense", "", ""]
        rows.append([figures.layer_label(i, layer), *numbers])
    return comparison.plain_table(head, rows)


def _options(config: Mapping[str, Any]) -> dict[str, str]:
    """The options that were in force, as the command line calls them."""
    shown = {}
    for name, value in config.items():
        # a report may be shared, and paths are private
        if value is None or name in ("data_dir", "mirror"):
            continue
        if name in ("data", "test_data", "validation_data"):
            value = Path(str(value)).name
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if isinstance(value, dict):
            value = ", ".join(f"{key} = {item}" for key, item in value.items()) or "its defaults"
        shown[name.replace("_", " ")] = str(value)
    return shown


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in values.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'

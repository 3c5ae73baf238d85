"""The results as tables for a terminal; they read the results file's own form, so any saved run can
be shown.
"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

__all__ = ["bar", "curve", "disturbance", "layer", "machine", "model", "verdicts", "wide"]

COLOUR = {"met": "green", "missed": "red", "in part": "yellow"}
#: Columns of words.
LEFT = ("note", "verdict", "layer", "what", "nearest to its bar")
#: Above this share of the machine in other hands, figures are not to be trusted.
BUSY = 0.1
CPU_TIME = (
    "CPU seconds of one thread: a diagnosis; the bars are for time on the wall and two threads"
)


def duration(seconds: float) -> str:
    """With a unit that suits."""
    for factor, unit in ((1e6, "us"), (1e3, "ms"), (1.0, "s")):
        if seconds * factor < 1000 or unit == "s":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("unreachable")


def number(value: float | None, unit: str = "") -> str:
    """Three digits that count, with the unit."""
    if value is None:
        return "not available"
    shown = (
        f"{value:,.0f}"
        if abs(value) >= 1000
        else f"{value:.4g}"
        if 0.9 < value < 1
        else f"{value:.3g}"
    )
    return f"{shown} {unit}".strip()


def speedup(row: dict[str, Any]) -> str:
    """Of a row of `layer`, over the dense layer; empty where there is none."""
    return "" if row["speedup"] is None else f"{number(row['speedup'])} x"


def share(value: float | None) -> str:
    """As percent; empty if unknown."""
    return "" if value is None else f"{value:.0%}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column in LEFT else "right")
    return table


def machine(m: dict[str, Any]) -> str:
    """One line on what it runs on."""
    load = m["load_average"]
    return escape(
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['memory_gib']} GiB; torch "
        f"{m['torch']}, "
        f"rewire {m['rewire']}, {m['kernels']}, SparseProp {m['sparseprop'] or 'not installed'}"
        + (f"; load average {load[0]}" if load else "")
        + "".join(f"; {name}={value}" for name, value in m["openmp"].items())
    )


def disturbance(others: float | None) -> str:
    """Whether the machine was quiet."""
    if others is None:
        return "this system does not tell what other programs took of the machine"
    text = f"other programs took {others:.0%} of the machine meanwhile"
    if others <= BUSY:
        return text
    hint = (
        "with GOMP_SPINCOUNT=10000 in the environment threads wait without spinning, "
        "which "
        "then disturbs less"
    )
    return f"[yellow]{text}: take the figures as preliminary ({hint})[/yellow]"


def bar(result: dict[str, Any]) -> Table:
    """The figures of a bar."""
    colour = COLOUR.get(result["status"], "dim")
    busy = share(result["others"])
    table = _table(
        f"{result['name'].upper()}  {result['title']}",
        "figure",
        "measured",
        "quartiles",
        "bar",
        "",
        "note",
    )
    for f in result["figures"]:
        mark = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}[f["met"]]
        around = "" if f["low"] is None else f"{number(f['low'])} .. {number(f['high'])}"
        limit = "" if f["bar"] is None else f"{f['sense']} {number(f['bar'], f['unit'])}"
        table.add_row(
            escape(f["name"]), number(f["value"], f["unit"]), around, limit, mark, escape(f["note"])
        )
    reason = f": {escape(result['reason'])}" if result["reason"] else ""
    table.caption = f"[{colour}]{result['status']}{reason}[/{colour}]" + (
        f", others took {busy}" if busy else ""
    )
    return table


def verdicts(results: list[dict[str, Any]]) -> Table:
    """One line for every bar."""
    table = _table(
        "Bars", "bar", "what", "verdict", "figures met", "nearest to its bar", "others took"
    )
    for r in results:
        judged = [f for f in r["figures"] if f["met"] is not None]
        worst = min(judged, key=_margin, default=None)
        nearest = (
            "" if worst is None else (f"{worst['name']}: {number(worst['value'], worst['unit'])}")
        )
        if worst is not None:
            nearest += f" ({worst['sense']} {number(worst['bar'], worst['unit'])})"
        met = f"{sum(f['met'] for f in judged)} of {len(judged)}" if judged else ""
        colour = COLOUR.get(r["status"], "dim")
        table.add_row(
            r["name"],
            escape(r["title"]),
            f"[{colour}]{r['status']}[/{colour}]",
            met,
            escape(nearest),
            share(r["others"]),
        )
    return table


def _margin(figure: dict[str, Any]) -> float:
    value, limit = figure["value"], figure["bar"]
    if limit <= 0 or value <= 0:
        return 0.0 if figure["met"] is False else 1e9
    return float(value / limit if figure["sense"] == ">=" else limit / value)


def curve(c: dict[str, Any]) -> Table:
    """Times of one layer over densities, and break-even densities."""
    title = f"{c['outputs']} x {c['inputs']}, batch {c['batch']}: forward + backward"
    table = _table(title, "", *(f"{d:.3g}" for d in c["densities"]))
    for kind, seconds in c["seconds"].items():
        table.add_row(kind, *(duration(s) for s in seconds))
    table.caption = "; ".join(
        f"{pair.replace(' / ', ' breaks even with ')} at {_density(d)}"
        for pair, d in c["break_even"].items()
        if pair.startswith("rewire /")
    )
    return table


def _density(d: float | None) -> str:
    if d is None:
        return "no density tried (always faster)"
    return f"{d:.1%}" if d else "no density tried (always slower)"


def layer(found: dict[str, Any]) -> Table:
    """The user's layer: every way to compute it."""
    c = found["curve"]
    title = (
        f"{c['outputs']} x {c['inputs']}, density {found['density']:g}, batch "
        f"{c['batch']}: "
        "forward + backward"
    )
    table = _table(title, "", "time", "over nn.Linear", "quartiles", "memory")
    for row in found["rows"]:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.1f} MiB"
        known = row["speedup"] is not None
        around = f"{number(row['low'])} .. {number(row['high'])}" if known else ""
        table.add_row(row["kind"], duration(row["seconds"]), speedup(row), around, size)
    table.caption = curve(c).caption
    return table


def model(found: dict[str, Any]) -> Table:
    """A model's layers."""
    title = f"{found['model']}, density {found['density']:g}, batch {found['batch']}"
    table = _table(
        title, "layer", "what", "rows", "dense", "sparse", "dense / sparse", "faster here"
    )
    for row in found["layers"]:
        if "speedup" not in row:
            table.add_row(
                escape(row["name"]),
                row["layer"],
                str(row["rows"]),
                "",
                "",
                "",
                f"{row['verdict']}: {row['note']}",
            )
            continue
        colour = "green" if row["verdict"] == "sparse" else "dim"
        faster = f"[{colour}]{row['verdict']}[/{colour}]" + (
            f" ({row['note']})" if row["note"] else ""
        )
        times = (
            duration(row["dense_seconds"]),
            duration(row["sparse_seconds"]),
            f"{row['speedup']:.3g} x",
        )
        table.add_row(escape(row["name"]), row["layer"], str(row["rows"]), *times, faster)
    return table


def wide(w: dict[str, Any]) -> str:
    """The wide network in one line."""
    if "not_available" in w:
        return f"wide network: not available: {escape(w['not_available'])}"
    return (
        f"wide network, synthetic data of the shape of {w['data']}: {w['neurons']:,} neurons, "
        f"{w['connections']:,} connections; an epoch of {w['planned_steps']} steps at batch "
        f"{w['batch']} with SET "
        f"{w['epoch_seconds']:.1f} s (of it SET {w['update_seconds']:.1f} s), built in "
        f"{w['build_seconds']:.1f} s, "
        f"peak {w['peak'] / 2**30:.1f} GiB"
    )

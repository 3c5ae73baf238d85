"""The results as tables of words, which the terminal and the page show alike.

They are made from the results file's own form, so that any saved run can be shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

_COLOURS = {
    "met": "green",
    "missed": "red",
    "in part": "yellow",
    "sparse": "green",
    "better": "green",
    "worse": "red",
}
#: Columns of words; the others hold numbers.
WORDS = ("note", "verdict", "layer", "what", "nearest to its target", "faster here")
#: Above this share of the machine in other hands, figures are not to be trusted.
BUSY = 0.1
CPU_TIME = (
    "CPU seconds of one thread: a diagnosis; the targets are for two threads and the wall clock"
)


@dataclass(frozen=True)
class Sheet:
    """A table: its heading, the names of its columns, its rows, and a line below."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def printed(self) -> Table:
        """For a terminal, with colours."""
        table = Table(title=escape(self.title), box=box.SIMPLE_HEAD, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 or column in WORDS else "right")
        for row in self.rows:
            table.add_row(*map(_coloured, row))
        table.caption = _coloured(self.note)
        return table


def _coloured(text: str) -> str:
    """A verdict in its colour; whatever follows it keeps the terminal's."""
    words = re.match(r"[a-z]+( part)?(?=$|[ :;])", text)
    colour = _COLOURS.get(words[0]) if words else None
    if words is None or colour is None:
        return escape(text)
    return f"[{colour}]{words[0]}[/{colour}]{escape(text[words.end() :])}"


def duration(seconds: float) -> str:
    """With a unit that suits."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def number(value: float | None, unit: str = "") -> str:
    """Three digits that count, with the unit."""
    if value is None:
        return "not available"
    digits = ",.0f" if abs(value) >= 1000 else ".4g" if 0.9 < value < 1 else ".3g"
    return f"{value:{digits}} {unit}".strip()


def share(value: float | None) -> str:
    """As percent; empty if unknown."""
    return "" if value is None else f"{value:.0%}"


def _between(row: dict[str, Any]) -> str:
    """The quartiles; empty where there are none."""
    return "" if row.get("low") is None else f"{number(row['low'])} to {number(row['high'])}"


def _limit(figure: dict[str, Any]) -> str:
    """The target of a figure; empty without one."""
    if figure["target"] is None:
        return ""
    return f"{figure['sense']} {number(figure['target'], figure['unit'])}"


def figure_line(figure: dict[str, Any]) -> str:
    """A figure that has a target, in one line."""
    value = number(figure["value"], figure["unit"])
    return f"{figure['name']}: {value} ({_limit(figure)})"


def machine(m: dict[str, Any]) -> str:
    """What it runs on, in one line."""
    load = m["load_average"]
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['memory_gib']} GiB; "
        f"torch {m['torch']}, rewire {m['rewire']}, {m['kernels']}, "
        + ", ".join(f"{name} {v or 'not installed'}" for name, v in m["others"].items())
        + (f"; load average {load[0]}" if load else "")
        + "".join(f"; {name}={value}" for name, value in m["openmp"].items())
    )


def ceilings(found: dict[str, Any] | None) -> str:
    """What the machine can do at most, in one line."""
    if found is None:
        return "ceilings not measured: the native kernels are not in use"
    levels = ", ".join(f"{x['name']} {x['flops'] / 1e9:.3g}" for x in found["levels"])
    return (
        f"ceilings in GFLOP/s: {found['peak'] / 1e9:.4g} with numbers in registers; with one "
        f"factor of each multiply-add read from {levels}"
    )


def disturbance(others: float | None) -> str:
    """Whether the machine was quiet."""
    if others is None:
        return "this system does not tell how much of the machine other programs took"
    text = f"other programs took {others:.0%} of the machine meanwhile"
    if others <= BUSY:
        return text
    return (
        f"{text}: take the figures as preliminary (with GOMP_SPINCOUNT=10000 in the environment "
        "threads wait without spinning, which then disturbs less)"
    )


def target(result: dict[str, Any]) -> Sheet:
    """The figures of a target."""
    verdict = {True: "met", False: "missed", None: ""}
    rows = [
        [
            f["name"],
            number(f["value"], f["unit"]),
            _between(f),
            _limit(f),
            verdict[f["met"]],
            f["note"],
        ]
        for f in result["figures"]
    ]
    reason = f": {result['reason']}" if result["reason"] else ""
    busy = share(result["others"])
    return Sheet(
        f"{result['name'].upper()}: {result['title']}",
        ("figure", "measured", "quartiles", "target", "verdict", "note"),
        rows,
        result["status"]
        + reason
        + (f"; other programs took {busy} of the machine" if busy else ""),
    )


def verdicts(results: list[dict[str, Any]]) -> Sheet:
    """One line for every target."""
    rows = []
    for r in results:
        judged = [f for f in r["figures"] if f["met"] is not None]
        worst = min(judged, key=_margin, default=None)
        nearest = "" if worst is None else figure_line(worst)
        met = f"{sum(f['met'] for f in judged)} of {len(judged)}" if judged else ""
        rows.append([r["name"], r["title"], r["status"], met, nearest, share(r["others"])])
    columns = ("", "what", "verdict", "figures met", "nearest to its target", "others took")
    return Sheet("Performance targets", columns, rows)


def _margin(figure: dict[str, Any]) -> float:
    if figure["margin"]:
        return float(figure["margin"])
    return 1e9 if figure["met"] else 0.0


def curve(c: dict[str, Any]) -> Sheet:
    """Times of one layer over densities, and break-even densities."""
    return Sheet(
        f"{c['outputs']} x {c['inputs']}, batch {c['batch']}: forward + backward",
        ("", *(f"{d:.3g}" for d in c["densities"])),
        [[kind, *map(duration, seconds)] for kind, seconds in c["seconds"].items()],
        "; ".join(
            f"{pair.replace(' / ', ' breaks even with ')} at {_density(d)}"
            for pair, d in c["break_even"].items()
            if pair.startswith("rewire /")
        ),
    )


def _density(d: float | None) -> str:
    if d is None:
        return "no density tried (always faster)"
    return f"{d:.1%}" if d else "no density tried (always slower)"


def _up_to(break_even: float | None) -> str:
    """A break-even density in a cell."""
    if break_even is None:
        return "any density"
    return f"{break_even:.0%}" if break_even else "none tried"


def layer(found: dict[str, Any]) -> Sheet:
    """The user's layer: every way to compute it."""
    c = found["curve"]
    rows = []
    for row in found["rows"]:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.1f} MiB"
        speedup = "" if row["speedup"] is None else f"{number(row['speedup'])} x"
        rows.append([row["kind"], duration(row["seconds"]), speedup, _between(row), size])
    return Sheet(
        f"{c['outputs']} x {c['inputs']}, density {found['density']:g}, batch {c['batch']}: "
        "forward + backward",
        ("", "time", "over nn.Linear", "quartiles", "memory"),
        rows,
        curve(c).note,
    )


def model(found: dict[str, Any]) -> Sheet:
    """A model's layers."""
    rows = []
    for row in found["layers"]:
        times = ["", "", "", ""]
        if "speedup" in row:
            dense, sparse = duration(row["dense_seconds"]), duration(row["sparse_seconds"])
            times = [dense, sparse, f"{row['speedup']:.3g} x", _up_to(row["break_even"])]
        note = f" ({row['note']})" if row["note"] else ""
        rows.append([row["name"], row["layer"], str(row["rows"]), *times, row["verdict"] + note])
    return Sheet(
        f"{found['model']}, density {found['density']:g}, batch {found['batch']}",
        (
            "layer",
            "what",
            "rows",
            "dense",
            "sparse",
            "dense / sparse",
            "sparse up to",
            "faster here",
        ),
        rows,
        "sparse up to: the density below which the sparse layer is the faster one, at these rows",
    )


def wide(w: dict[str, Any]) -> str:
    """The wide network in one line."""
    if "not_available" in w:
        return f"wide network: not available: {w['not_available']}"
    return (
        f"wide network, synthetic data of the shape of {w['data']}: {w['neurons']:,} neurons, "
        f"{w['connections']:,} connections; an epoch of {w['planned_steps']} steps at batch "
        f"{w['batch']} with SET {w['epoch_seconds']:.1f} s (of it SET {w['update_seconds']:.1f} "
        f"s), built in {w['build_seconds']:.1f} s, peak {w['peak'] / 2**30:.1f} GiB"
    )

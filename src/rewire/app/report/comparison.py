"""The network before and after training: tiles and tables of the report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rewire.app.report.read import Run

ARROW = " → "


def plain_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()
) -> str:
    """A table; its first column and those that ``words`` names are text, the others numbers."""
    kinds = ["" if i == 0 or c in words else ' class="number"' for i, c in enumerate(head)]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(kinds, cells, strict=True)
        inner = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in pairs)
        return f"<tr>{inner}</tr>"

    body = line("th", head) + "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>{body}</table></div>'


def amount(size: int, unit: str = "B") -> str:
    """A number with its thousands as k, M, G: 202,440 is 202 k."""
    for factor, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if size >= factor:
            return f"{size / factor:.3g} {prefix}{unit}"
    return f"{size} {unit}".rstrip()


def tiles(run: Run) -> list[tuple[str, str]]:
    """Sizes and time, before and after."""
    before, after, took = run.before, run.after, run.inference
    units = [
        "-".join(str(layer["active_units"]) for layer in part["layers"]) for part in (before, after)
    ]
    return [
        (_pair(amount(before["bytes"]), amount(after["bytes"])), "weights, biases and positions"),
        (
            _pair(amount(before["multiply_adds"], ""), amount(after["multiply_adds"], "")),
            "multiply-adds for a sample",
        ),
        (
            f"{took['speedup']:.2f} times",
            f"as fast: {took['before_ms']:.3g}{ARROW}{took['after_ms']:.3g} ms for "
            f"{took['samples']} samples",
        ),
        (units[1], f"active units, of {units[0]}"),
    ]


def _pair(before: str, after: str) -> str:
    """The two with an arrow, the unit once where it is the same."""
    number, _, unit = before.partition(" ")
    same = unit == after.partition(" ")[2]
    return f"{number if same else before}{ARROW}{after}"


def _factor(before: float, after: float) -> str:
    """How many times smaller; a network may be larger as well."""
    if not before or not after:
        return ""
    if before == after:
        return "the same"
    ratio = before / after
    return f"{ratio:.3g} times smaller" if ratio >= 1 else f"{1 / ratio:.3g} times larger"


def table(run: Run) -> str:
    """Everything that was compared, in one table."""
    before, after, took = run.before, run.after, run.inference
    names = {
        "parameters": "trained numbers",
        "bytes": "bytes of weights, biases and positions",
        "file_bytes": "bytes of the file",
        "multiply_adds": "multiply-adds of one sample",
    }
    rows = [
        [name, f"{before[key]:,}", f"{after[key]:,}", _factor(before[key], after[key])]
        for key, name in names.items()
    ]
    for key, name in (("connections", "connections"), ("active_units", "active units")):
        one, two = (sum(layer[key] for layer in part["layers"]) for part in (before, after))
        rows.append([name, f"{one:,}", f"{two:,}", _factor(one, two)])
    low, high = took["quartiles"]
    rows.append(
        [
            f"inference, {took['samples']} samples, {_threads(took['threads'])}",
            f"{took['before_ms']:.3g} ms",
            f"{took['after_ms']:.3g} ms",
            f"{took['speedup']:.2f} times as fast ({low:.2f} to {high:.2f})",
        ]
    )
    dense = before.get("network") == "dense"
    which = "the dense network of these layers" if dense else "the network that training began with"
    note = (
        f"Before: {which}. Times are medians of {took['rounds']} rounds in which both ran in "
        "turns; their ratio is "
        "taken within a round, quartiles in brackets."
    )
    return plain_table(["", "before", "after", ""], rows) + f'<p class="soft">{escape(note)}</p>'


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def layer_table(run: Run) -> str:
    """Units, connections and multiply-adds of every layer."""
    rows = []
    for number, (before, after) in enumerate(
        zip(run.before["layers"], run.after["layers"], strict=True), start=1
    ):
        kept = after["connections"] / max(before["connections"], 1)
        kind = (
            after["kind"]
            if before["kind"] == after["kind"]
            else f"{before['kind']}{ARROW}{after['kind']}"
        )
        rows.append(
            [
                f"layer {number}",
                kind,
                f"{before['active_units']:,}{ARROW}{after['active_units']:,}",
                f"{before['connections']:,}{ARROW}{after['connections']:,}",
                f"{before['connections'] - after['connections']:,} ({1 - kept:.1%})",
                f"{before['multiply_adds']:,}{ARROW}{after['multiply_adds']:,}",
            ]
        )
    return plain_table(
        ["", "type", "active units", "connections", "removed", "multiply-adds"], rows
    )

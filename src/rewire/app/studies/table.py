"""The table of a study: for the terminal, in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rewire.app.studies.statistics import Row, Verdict

__all__ = ["CSV_COLUMNS", "NOTE", "claim_lines", "show", "to_csv", "to_latex", "to_markdown"]

HEAD = (
    "method",
    "density",
    "accuracy (%)",
    "p",
    "connections",
    "multiply-adds",
    "time",
    "memory",
    "inference",
)
NOTE = (
    "Accuracy on the test set: mean ± standard deviation over seeds; bold: the best at its "
    "density. p: paired t-test over seeds against the best, adjusted for several comparisons by "
    "Holm's rule. Multiply-adds, seconds and peak memory (beyond program and data) are of "
    "training; multiply-adds leave out a method's own work at updates. Inference: milliseconds of "
    "a batch."
)


def amount(value: float | None, unit: str = "") -> str:
    """A number with its thousands as k, M, G, T, P: 202,440 is 202 k."""
    if value is None:
        return ""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def score(row: Row) -> str:
    """ "95.81 ± 0.52"; what went wrong where there is no score."""
    if row.mean is None:
        return "failed" if row.failed else ""
    text = f"{100 * row.mean:.2f}"
    if row.spread is not None:
        text += f" ± {100 * row.spread:.2f}"
    missing = row.seeds - len(row.scores)
    return text + (f" ({len(row.scores)} of {row.seeds} seeds)" if missing else "")


def chance(row: Row) -> str:
    """A p value."""
    if row.p is None:
        return ""
    return "< 0.001" if row.p < 0.001 else f"{row.p:.3f}"


def density(row: Row) -> str:
    """The budget; of a method without one what it left."""
    if row.cell.density is not None:
        return f"{100 * row.cell.density:g} %"
    connections = row.number("connections")
    if connections is None or not row.possible:
        return ""
    return f"{100 * connections / row.possible:.3g} %"


def head_of(rows: Sequence[Row]) -> list[str]:
    """The names of the columns; of a regression the score is R²."""
    metrics = {o.get("metric") for row in rows for o in row.outcomes.values()}
    return [name.replace("accuracy", "R²") if metrics == {"r2"} else name for name in HEAD]


def cells_of(row: Row) -> list[str]:
    """What the table shows of a row, as `HEAD` says."""
    seconds, inference = row.number("seconds"), row.inference
    connections = row.number("connections")
    return [
        row.cell.entry.label,
        density(row),
        score(row),
        chance(row),
        "" if connections is None else f"{connections:,.0f}",
        amount(row.number("training_multiply_adds")),
        "" if seconds is None else f"{seconds:.3g} s",
        amount(row.number("peak_memory"), "B"),
        "" if inference is None else f"{inference:.3g} ms",
    ]


def groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by data and network, with a heading."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row.cell.data}, {row.cell.model}", []).append(row)
    return list(found.items())


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the table; a narrow terminal gets fewer columns."""
    columns = range(len(HEAD)) if console.width >= 100 else (0, 1, 2, 3, 6)
    for heading, group in groups(rows):
        table = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left")
        for i in columns:
            table.add_column(head_of(group)[i], justify="left" if i == 0 else "right", no_wrap=True)
        last: Any = None
        for row in group:
            if last is not None and row.cell.density != last[0]:
                table.add_section()
            last = (row.cell.density,)
            cells = cells_of(row)
            table.add_row(*(cells[i] for i in columns), style="bold" if row.best else None)
        console.print(table)
    for row in rows:
        for reason in dict.fromkeys(row.failed):
            console.print(f"{row.cell} failed: {reason}", markup=False)


def to_markdown(rows: Sequence[Row]) -> str:
    """A table for each data set and network."""
    parts = []
    for heading, group in groups(rows):
        lines = [
            f"**{heading}**",
            "",
            "| " + " | ".join(head_of(group)) + " |",
            "| --- |" + " ---: |" * (len(HEAD) - 1),
        ]
        for row in group:
            cells = [cell.replace("|", "\\|") for cell in cells_of(row)]
            if row.best:
                cells[2] = f"**{cells[2]}**"
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, NOTE]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "²": "$^2$",
    "<": "$<$",
    ">": "$>$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def to_latex(rows: Sequence[Row]) -> str:
    r"""One ``tabular`` a data set and network; the document has ``\usepackage{booktabs}``."""
    parts = []
    for heading, group in groups(rows):
        lines = [
            f"% {heading}",
            r"\begin{tabular}{l" + "r" * (len(HEAD) - 1) + "}",
            r"\toprule",
            " & ".join(map(_latex, head_of(group))) + r" \\",
            r"\midrule",
        ]
        last = group[0].cell.density
        for row in group:
            if row.cell.density != last:
                lines.append(r"\midrule")
                last = row.cell.density
            cells = [_latex(cell) for cell in cells_of(row)]
            if row.best:
                cells[2] = r"\textbf{" + cells[2] + "}"
            lines.append(" & ".join(cells) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


CSV_COLUMNS = (
    "data",
    "model",
    "method",
    "density",
    "seed",
    "test_accuracy",
    "test_loss",
    "validation_accuracy",
    "connections",
    "possible_connections",
    "epochs",
    "training_multiply_adds",
    "training_seconds",
    "peak_memory_bytes",
    "inference_ms",
    "inference_samples",
    "threads",
)


def to_csv(rows: Sequence[Row]) -> str:
    """A line for each run, with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        for seed, found in sorted(row.outcomes.items()):
            took = found["inference"]
            writer.writerow(
                [
                    row.cell.data,
                    row.cell.model,
                    row.cell.entry.label,
                    row.cell.density,
                    seed,
                    found["score"],
                    found["loss"],
                    found["validation"],
                    found["connections"],
                    found["possible"],
                    found["epochs"],
                    found["training_multiply_adds"],
                    found["seconds"],
                    found["peak_memory"],
                    took["ms"],
                    took["samples"],
                    took["threads"],
                ]
            )
    return text.getvalue()


def claim_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each claim."""
    words = {True: "holds", False: "missed", None: "not known yet"}
    return [
        f"{words[verdict.holds]}: {verdict.claim}"
        + ("" if verdict.found is None else f" (found {verdict.found:.2f})")
        for verdict in verdicts
    ]

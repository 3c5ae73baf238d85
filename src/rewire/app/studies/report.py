"""The report of a study: one HTML page that needs nothing but a browser."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rewire.app.report.figures import Figure
from rewire.app.report.page import assemble, grid
from rewire.app.studies import figures, table
from rewire.app.studies.figures import Look
from rewire.app.studies.plan import Plan
from rewire.app.studies.stages import Outlook
from rewire.app.studies.statistics import Row, Verdict, check_claims, make_rows

__all__ = ["render"]

#: Densities at most whose charts the page has, so that it stays small.
DENSITIES = 4
CURVES = (
    (
        "validation_accuracy",
        "Validation accuracy",
        "Mean over seeds, after each epoch.",
        "accuracy (%)",
    ),
    (
        "turnover",
        "Turnover",
        "Connections grown in an epoch, as a share of all, mean over seeds.",
        "turnover (% per epoch)",
    ),
    (
        "survived",
        "Survival of connections",
        "Share of the connections of the start that are there, mean over seeds.",
        "connections of the start (%)",
    ),
)


def render(plan: Plan, outlook: Outlook, name: str) -> str:
    """The page."""
    rows = make_rows(plan, outlook)
    drawn: dict[str, Figure] = {}
    title = plan.title or name
    parts = [f"<h1>{escape(title)}</h1>"]
    if plan.claim:
        parts.append(f"<p>{escape(plan.claim)}</p>")
    about = [plan.source, plan.scaled and f"Scaled: {plan.scaled}"]
    parts += [f'<p class="soft">{escape(text)}</p>' for text in about if text]
    seeds = ", ".join(map(str, plan.seeds))
    parts.append(f'<p class="soft">study {escape(name)}, seeds {seeds}</p>')
    if not outlook.over:
        parts.append(
            f'<p class="state">This study is not over: {outlook.ended} of {outlook.planned} runs '
            "have ended.</p>"
        )
    parts.append(_claims(check_claims(plan, rows)))
    look = Look([row.cell.entry.label for row in rows])
    groups = table.groups(rows)
    for heading, group in groups:
        parts.append(f"<h2>{escape(heading)}</h2>")
        parts.append(_table(group))
        parts += _failures(group)
        if any(row.scores for row in group):
            parts += _charts(group, look, drawn)
    parts.append(f'<p class="soft">{escape(table.NOTE)}</p>')
    parts += _settings(plan, rows)
    return assemble(title, "\n".join(parts), drawn)


def _claims(verdicts: Sequence[Verdict]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in table.claim_lines(verdicts))
    return f"<ul>{items}</ul>" if items else ""


def _table(rows: Sequence[Row]) -> str:
    """The table, with the calibration error as one more column."""
    head = [*table.head_of(rows), "calibration error"]
    lines = ["".join(f"<th{_kind(i)}>{escape(cell)}</th>" for i, cell in enumerate(head))]
    for row in rows:
        error = figures.expected_error(row) if row.outcomes else None
        cells = [*table.cells_of(row), "" if error is None else f"{error:.2f} %"]
        inner = "".join(f"<td{_kind(i)}>{escape(cell)}</td>" for i, cell in enumerate(cells))
        lines.append(inner)
    marks = ["", *(' class="best"' if row.best else "" for row in rows)]
    body = "".join(f"<tr{mark}>{line}</tr>" for mark, line in zip(marks, lines, strict=True))
    return f'<div class="scroll"><table>{body}</table></div>'


def _kind(column: int) -> str:
    return "" if column == 0 else ' class="number"'


def _failures(rows: Sequence[Row]) -> list[str]:
    lines = [f"{row.cell} failed: {why}" for row in rows for why in dict.fromkeys(row.failed)]
    return [f'<p class="state">{escape(line)}</p>' for line in lines]


def _charts(rows: Sequence[Row], look: Look, drawn: dict[str, Figure]) -> list[str]:
    """All charts of one data set and network."""
    parts = [
        grid([figures.accuracy(rows, look)], drawn),
        grid(
            [
                figures.against(rows, look, "seconds", "training time", "s", 1.0),
                figures.against(rows, look, "peak_memory", "peak memory", "MB", 1e-6),
                figures.against(
                    rows, look, "training_multiply_adds", "training multiply-adds", "G", 1e-9
                ),
            ],
            drawn,
        ),
    ]
    densities = sorted({r.cell.density for r in rows if r.cell.density is not None and r.scores})
    shown = _some(densities)
    if len(shown) < len(densities):
        left = len(densities) - len(shown)
        parts.append(f'<p class="soft">Details of {left} more densities are in table.csv.</p>')
    # what has no budget stands beside every density
    for density in shown or (None,):
        group = [row for row in rows if row.cell.density in (None, density)]
        if density is not None:
            parts.append(f"<h3 class='gap'>At {100 * density:g} % of the connections</h3>")
        charts = [figures.over_time(group, look, *curve) for curve in CURVES]
        charts += [
            figures.calibration(group, look),
            figures.degrees(group, look, "out"),
            figures.degrees(group, look, "in"),
        ]
        parts.append(grid([chart for chart in charts if chart is not None], drawn))
        if images := figures.pictures(group):
            parts.append("<h3 class='gap'>Where the networks look</h3>")
            parts.append(grid(images, drawn, small=True))
    return parts


def _some(densities: Sequence[float]) -> list[float]:
    """The ends and some between."""
    if len(densities) <= DENSITIES:
        return list(densities)
    step = (len(densities) - 1) / (DENSITIES - 1)
    return [densities[round(i * step)] for i in range(DENSITIES)]


def _settings(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """What was set, and what a search found."""
    pairs = {"match": plan.match, **{str(n): str(v) for n, v in plan.train.items()}}
    pairs = {n: v for n, v in pairs.items() if n not in ("data_dir", "mirror")}
    for row in rows:
        if row.tuned:
            found = ", ".join(f"{n.removeprefix('set.')} = {v}" for n, v in row.tuned.items())
            pairs[f"found for {row.cell}"] = found
    lines = "".join(
        f"<tr><th>{escape(n.replace('_', ' '))}</th><td>{escape(v)}</td></tr>"
        for n, v in pairs.items()
    )
    return [f'<h2>Settings</h2><div class="scroll"><table>{lines}</table></div>']

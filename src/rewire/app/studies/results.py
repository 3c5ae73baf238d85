"""Where a study stands, as tables in the terminal and in files."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from rewire.app.report.page import REPORT
from rewire.app.studies import report, table
from rewire.app.studies.plan import Plan
from rewire.app.studies.stages import Outlook
from rewire.app.studies.statistics import check_claims, make_rows
from rewire.storage import files

__all__ = ["FORMATS", "SUMMARY", "show"]

#: Kinds of tables, and the files that hold them.
FORMATS = {"markdown": "table.md", "latex": "table.tex", "csv": "table.csv"}
#: The claims of a study and what was found, beside its table in Markdown.
SUMMARY = "summary.json"


def show(plan: Plan, outlook: Outlook, folder: Path, kind: str, console: Console) -> None:
    """Write all tables into the folder of the study and print one of ``kind``."""
    rows = make_rows(plan, outlook)
    verdicts = check_claims(plan, rows)
    texts = {
        "markdown": table.to_markdown(rows),
        "latex": table.to_latex(rows),
        "csv": table.to_csv(rows),
    }
    for name, file in FORMATS.items():
        files.write_atomic(folder / file, texts[name].encode())
    summary = {
        "runs": {"ended": outlook.ended, "planned": outlook.planned},
        "claims": [vars(verdict) | {"holds": verdict.holds} for verdict in verdicts],
        "table": texts["markdown"],
    }
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    files.write_atomic(folder / SUMMARY, text.encode())
    page = report.render(plan, outlook, folder.resolve().name)
    files.write_atomic(folder / REPORT, page.encode("utf-8", "replace"))
    if kind in texts:
        print(texts[kind], end="")
        return
    table.show(console, rows)
    for line in table.claim_lines(verdicts):
        console.print(line, markup=False)
    print(f"tables  {', '.join(str(folder / file) for file in FORMATS.values())}")
    print(f"report  {folder / REPORT}")

"""Rows and tables: against SciPy, and against numbers that were counted by hand."""

import csv
import io
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console
from scipy import stats

from outcomes import outcome
from rewire.app.studies import table
from rewire.app.studies.plan import Plan, make_plan
from rewire.app.studies.stages import Outlook
from rewire.app.studies.statistics import check_claims, make_rows, paired_p

SCORES = {
    "dense": [0.98, 0.97, 0.99],
    "static": [0.90, 0.91, 0.89],
    "set": [0.95, 0.97, 0.93],
    "deep-r": [0.94, 0.95, 0.93],
}


def ended(score: float) -> FrozenTrial:
    return create_trial(value=score, user_attrs={"outcome": outcome(score)})


def study(scores: dict[str, list[float]], **values: Any) -> tuple[Plan, Outlook]:
    methods = [m if m != "dense" else {"method": "noiseout", "name": "dense"} for m in scores]
    plan = make_plan({"methods": methods, "models": ["mlp:30"], **values})
    outlook = Outlook()
    for place, cell in enumerate(plan.cells()):
        found = scores[cell.entry.label]
        outlook.runs[place] = {seed: ended(score) for seed, score in enumerate(found)}
    return plan, outlook


def test_means_deviations_and_the_best_of_a_budget() -> None:
    rows = {row.cell.entry.label: row for row in make_rows(*study(SCORES))}
    assert rows["set"].mean == pytest.approx(0.95)
    assert rows["set"].spread == pytest.approx(0.02)
    assert [name for name, row in rows.items() if row.best] == [
        "set"
    ]  # the dense one has no budget
    assert rows["dense"].p is None
    assert rows["set"].p is None


def test_p_is_that_of_scipy_over_pairs_with_holms_rule() -> None:
    raw = {
        name: stats.ttest_rel(SCORES["set"], SCORES[name]).pvalue for name in ("static", "deep-r")
    }
    assert raw["static"] < raw["deep-r"]
    rows = {row.cell.entry.label: row for row in make_rows(*study(SCORES))}
    assert rows["static"].p == pytest.approx(2 * raw["static"])
    assert rows["deep-r"].p == pytest.approx(max(raw["deep-r"], 2 * raw["static"]))


def test_p_over_the_seeds_that_both_have() -> None:
    one, other = dict(enumerate(SCORES["set"])), dict(enumerate(SCORES["static"]))
    assert paired_p(one, other) == pytest.approx(
        stats.ttest_rel(SCORES["set"], SCORES["static"]).pvalue
    )
    assert paired_p({0: 0.5}, other) is None
    assert paired_p(other, other) == 1.0
    assert paired_p({k: v + 0.1 for k, v in other.items()}, other) == 0.0


def test_a_row_that_lacks_seeds_says_so_and_is_not_best() -> None:
    plan, outlook = study(SCORES)
    place = next(i for i, c in enumerate(plan.cells()) if c.entry.label == "set")
    outlook.runs[place] = {
        0: ended(0.99),
        1: create_trial(state=TrialState.FAIL, user_attrs={"error": "training diverged"}),
        2: create_trial(state=TrialState.FAIL),
    }
    rows = {row.cell.entry.label: row for row in make_rows(plan, outlook)}
    assert table.score(rows["set"]) == "99.00 (1 of 3 seeds)"
    assert rows["set"].failed == ["training diverged", "its worker died each time"]
    assert rows["deep-r"].best


def test_the_table_in_every_form() -> None:
    rows = make_rows(*study(SCORES, densities="0.1"))
    markdown = table.to_markdown(rows)
    assert "| set | 10 % | **95.00 ± 2.00** |  | 222 | 2.59 M | 1.5 s | 1.25 MB | 0.25 ms |" in (
        markdown
    )
    latex = table.to_latex(rows)
    assert r"set & 10 \% & \textbf{95.00 $\pm$ 2.00} &  & 222 & 2.59 M" in latex
    assert latex.count(r"\\") == len(rows) + 1
    lines = list(csv.DictReader(io.StringIO(table.to_csv(rows))))
    assert len(lines) == 12
    assert [float(x["test_accuracy"]) for x in lines if x["method"] == "set"] == SCORES["set"]
    assert lines[0]["density"] == ""
    for width, parts in ((160, ["1.25 MB", "95.00 ± 2.00"]), (79, ["95.00 ± 2.00"])):
        console = Console(width=width, record=True, file=io.StringIO())
        table.show(console, rows)
        shown = console.export_text()
        assert all(part in shown for part in parts)
        assert max(map(len, shown.splitlines())) <= width


def test_claims_hold_miss_or_are_not_known_yet() -> None:
    expect = [
        {"method": "set", "density": 0.1, "at_least": 94.5},
        {"method": "set", "above": "static", "at_least": 5.5},
        {"method": "static", "above": "dense", "at_least": 0},
    ]
    plan, outlook = study(SCORES, expect=expect)
    verdicts = check_claims(plan, make_rows(plan, outlook))
    assert [v.holds for v in verdicts] == [True, False, False]
    assert [v.found for v in verdicts] == [pytest.approx(x) for x in (95.0, 5.0, -8.0)]
    assert table.claim_lines(verdicts)[1] == "missed: set above static at least 5.5 (found 5.00)"
    outlook.runs[next(i for i, c in enumerate(plan.cells()) if c.entry.label == "set")].pop(0)
    verdicts = check_claims(plan, make_rows(plan, outlook))
    assert [v.holds for v in verdicts] == [None, None, False]

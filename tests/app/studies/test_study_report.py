"""The report of a study: small, whole, with right numbers and nothing from the network."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from optuna.trial import create_trial

import outcomes
from rewire.app.studies import figures, report
from rewire.app.studies.figures import Look
from rewire.app.studies.plan import Plan, make_plan
from rewire.app.studies.stages import Outlook
from rewire.app.studies.statistics import make_rows

METHODS = ["static", "set", "rigl", "deep-r", {"method": "noiseout", "name": "dense"}]


def outcome(score: float, seed: int) -> dict[str, Any]:
    epochs = list(range(1, 101))
    return {
        **outcomes.outcome(score),
        "curves": {
            "epoch": epochs,
            "validation_accuracy": [score] * 100,
            "turnover": [0.1 * (seed + 1)] * 100,
            "survived": [None, *[0.5] * 99],
        },
        "degrees": [
            {
                "name": "0.weight",
                "in": {"width": 1, "units": [1, 2, 1]},
                "out": {"width": 1 + seed % 2, "units": [2, 2]},
            }
        ],
        "picture": {"shape": [28, 28], "counts": [seed + i % 7 for i in range(784)]},
        "calibration": [[0, 0, 0]] * 8 + [[10, 8.5, 9], [30, 28.5, 24]],
    }


def study(title: str = "", densities: str = "0.02,0.1", seeds: int = 5) -> tuple[Plan, Outlook]:
    plan = make_plan({"methods": METHODS, "densities": densities, "seeds": seeds, "title": title})
    outlook = Outlook()
    for place, _ in enumerate(plan.cells()):
        outlook.runs[place] = {
            seed: create_trial(value=0.9, user_attrs={"outcome": outcome(0.9 + seed / 100, seed)})
            for seed in plan.seeds
        }
    return plan, outlook


class Parser(HTMLParser):
    """Checks that elements close in order; collects texts and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text


def charts(page: str) -> dict[str, Any]:
    found = re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def test_a_page_is_whole_small_and_fetches_nothing() -> None:
    page = report.render(*study(densities="0.01,0.02,0.05,0.1,0.2,0.5"), "name")
    assert len(page) < 1_000_000
    parser = Parser()
    parser.feed(page)
    assert parser.open == []
    assert parser.links == []
    drawn = charts(page)
    assert all(f'id="{name}"' in page for name in drawn)
    # at six densities the page has the details of four
    assert page.count("of the connections</h3>") == report.DENSITIES
    assert "Details of 2 more densities are in table.csv" in page
    for chart in drawn.values():
        assert chart["layout"]["xaxis"]["title"]["text"]
        assert chart["layout"]["yaxis"]["title"]["text"]


def test_text_cannot_become_markup() -> None:
    page = report.render(*study("</script><script>alert(1)</script>"), "<b>name</b>")
    assert "<script>alert" not in page
    assert "<b>name" not in page


def test_charts_show_means_over_seeds() -> None:
    rows = make_rows(*study(seeds=2))
    look = Look([row.cell.entry.label for row in rows])
    one = [row for row in rows if row.cell.density == 0.02]
    chart = figures.accuracy(rows, look)
    lines = {trace["name"]: trace for trace in chart.data}
    assert lines["set"]["x"] == [2.0, 10.0]
    assert lines["set"]["y"] == pytest.approx([90.5, 90.5])
    assert lines["set"]["error_y"]["array"] == pytest.approx([0.5**0.5] * 2)
    assert lines["dense"]["x"] == [pytest.approx(10.0)]  # what it left: 222 of 2,220
    turnover = figures.over_time(one, look, "turnover", "", "", "")
    assert turnover is not None
    assert turnover.data[0]["y"] == pytest.approx([15.0] * 100)
    survived = figures.over_time(one, look, "survived", "", "", "")
    assert survived is not None
    assert survived.data[0]["x"][0] == 2  # the first epoch has no number
    spread = figures.degrees(one, look, "out")
    assert spread is not None
    # widths 1 and 2: degrees 0 and 1 together, 2 and 3 together
    assert spread.data[0]["x"] == [0.5, 2.5]
    assert spread.data[0]["y"] == pytest.approx([75.0, 25.0])
    picture = figures.pictures(one)[0]
    assert picture.data[0]["z"][0][:3] == [0.5, 1.5, 2.5]


def test_the_calibration_error_is_the_mean_gap() -> None:
    rows = make_rows(*study(seeds=2))
    # of 40 answers 10 are right by 0.5 / 10 too often, 30 too seldom by 4.5 / 30
    assert figures.expected_error(rows[0]) == pytest.approx(100 * (0.5 + 4.5) / 40)


def test_methods_look_the_same_in_all_charts_and_differ_from_each_other() -> None:
    rows = make_rows(*study())
    look = Look([row.cell.entry.label for row in rows])
    styles = {row.cell.entry.label: json.dumps(look.of(row)) for row in rows}
    assert len(set(styles.values())) == len(styles) == 5


def test_a_study_that_is_not_over_says_so() -> None:
    plan, outlook = study()
    outlook.planned = 12
    outlook.runs[0].clear()
    page = report.render(plan, outlook, "name")
    assert "This study is not over: 0 of 12 runs have ended." in page

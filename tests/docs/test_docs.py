"""What README shows runs, the methods it lists exist, and results are those that were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from rewire import methods

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MNIST = (ROOT / "docs" / "mnist.md").read_text()


def test_first_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code
    torch.manual_seed(0)
    loader = [(torch.rand(10, 784), torch.randint(0, 10, (10,))) for _ in range(5)]
    names: dict[str, Any] = {"loader": loader}
    exec(code[1], names)
    connections = sum(names["model"][i].weight.connections for i in (0, 2))
    assert connections == round(0.05 * (784 * 300 + 300 * 10))
    assert names["method"].stats()["steps"] == 50


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):  # MkDocs checks those of docs/
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page


def test_methods_that_readme_lists_are_registered() -> None:
    families = re.findall(r"^- \*\*[^*]+\*\*: (`.*)$", README, re.MULTILINE)
    names = [name for family in families for name in re.findall(r"`([\w-]+)`", family)]
    assert len(names) > 20
    assert len(set(names)) == len(names)
    assert set(names) <= set(methods.available())


def test_madelon_is_as_measured() -> None:
    report = json.loads((ROOT / "docs" / "results" / "madelon.json").read_text())
    runs, informative = report["runs"], report["informative"]
    hits = sum(run["found"] == informative for run in runs)
    assert hits >= 4
    assert len(runs) == 5
    for run in runs:  # what is said to be found is what the counts say
        order = sorted(range(500), key=lambda i: run["fan_out"][i])
        assert sorted(order[-20:]) == run["found"]
        assert sum(run["fan_out"]) == run["connections"][0] == 30_000
    least = min(sorted(run["fan_out"])[-20] for run in runs)
    most = max(sorted(run["fan_out"])[-21] for run in runs)
    text = " ".join(MNIST.split())
    assert (
        f"in {hits} of {len(runs)} seeds the 20 most connected inputs are exactly those 20"
    ) in text
    assert f"at least {least} connections each against at most {most} of any other" in text

    def mean(kind: str, removed: int) -> str:
        return f"{sum(100 * run[kind][removed] for run in runs) / len(runs):.1f} %"

    low = [mean("least connected first", n) for n in (0, 400, 480)]
    assert f"Test accuracy is {low[0]} on average" in text
    assert f"it rises: {low[1]} without 400, {low[2]} with these 20 alone" in text
    assert f"it is {mean('most connected first', 20)} after 20" in text


def test_results_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "docs" / "results" / "mnist_authors.json").read_text())["results"]
    rows = re.findall(r"^\| ([^|]+) \| (\d\d\.\d\d) % \| ([\d., ]+) \|", MNIST, re.MULTILINE)
    assert len(rows) == len(measured)
    for name, mean, each in rows:
        runs = measured[name.replace("`--init sparse`", "started at sparse fan-in")]
        accuracy = [100 * run["test_accuracy"] for run in runs]
        assert mean == f"{sum(accuracy) / len(accuracy):.2f}"
        assert each == ", ".join(f"{a:.2f}" for a in accuracy)
    assert sum(r["test_accuracy"] for r in measured["DEEP R, fixed signs"]) / 5 >= 0.965


POSTERIOR = (ROOT / "docs" / "posterior.md").read_text()


def test_posterior_is_as_measured() -> None:
    runs = json.loads((ROOT / "docs" / "results" / "posterior.json").read_text())["results"]
    assert len(runs) == 3

    def mean(which: str, key: str) -> float:
        return sum(run[which][key] for run in runs) / len(runs)

    rows = re.findall(
        r"^\| .*(last|alone,|average) .*\| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) \| "
        r"([\d.]+) \|$",
        POSTERIOR,
        re.M,
    )
    names = {"last": "single", "alone,": "samples_alone_mean", "average": "average"}
    assert [names[row[0]] for row in rows] == list(names.values())
    for word, accuracy, *others in rows:
        which = names[word]
        assert accuracy == f"{100 * mean(which, 'accuracy'):.2f}"
        assert others == [f"{mean(which, key):.4f}" for key in ("nll", "ece", "brier")]
    for run in runs:  # the bar: averaging improves likelihood and calibration
        assert run["average"]["nll"] < run["single"]["nll"]
    assert mean("average", "ece") < mean("single", "ece")
    different = sum(run["connections_in_any_sample"] for run in runs) / len(runs)
    text = " ".join(POSTERIOR.split())
    assert (
        f"{different:,.0f} different connections, "
        f"{different / runs[0]['connections']:.1f} "
        "times as many"
    ) in text
    assert (
        f"{mean('mutual_information', 'wrong'):.3f} nats on average on test images that the "
        "average gets wrong" in text
    )
    assert f"gets wrong, {mean('mutual_information', 'right'):.3f} on the others" in text


def test_one_percent_is_what_was_measured() -> None:
    found = json.loads((ROOT / "docs" / "results" / "mnist_one_percent.json").read_text())
    assert sum(found["connections"]) == 2662
    rows = re.findall(
        r"^\| (DEEP R, \d+ epochs[^|]*) \| ([\d., ]+) \| "
        r"(\d\d\.\d\d) % \|$",
        MNIST,
        re.MULTILINE,
    )
    assert len(rows) == len(found["results"]) == 2
    means = []
    for title, each, mean in rows:
        name = "DEEP R, shifted images" if "shifted" in title else "DEEP R"
        assert f"{found['settings'][name]['epochs']} epochs" in title
        runs = found["results"][name]
        assert all(sum(run["connections"].values()) == 2662 for run in runs)
        accuracy = [100 * run["test_accuracy"] for run in runs]
        assert each == ", ".join(f"{a:.2f}" for a in accuracy)
        means.append(sum(accuracy) / len(accuracy))
        assert mean == f"{means[-1]:.2f}"
    assert min(means) >= 97.3
    assert max(means) >= 97.5

"""docs/halo_ternary.md: its example runs, and its numbers are those in
docs/results/halo_ternary.json.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from rewire.nn import sparse_weights

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "halo_ternary.md").read_text()
RESULTS: dict[str, list[dict[str, Any]]] = json.loads(
    (DOCS / "results" / "halo_ternary.json").read_text()
)["results"]
CUT = ("magnitude", "L1", "SWS", "HALO")
PACKED = ("sparse ternary, 5 %", "sparse ternary, 2 %")
DENSE = {"dense ternary": "ternary_bytes", "binary": "binary_bytes"}


def rows(first: str) -> dict[str, list[str]]:
    """The table whose first column is called ``first``: cells by the first one."""
    table = PAGE[PAGE.index(f"| {first} |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {line[0]: line[1:] for line in cells}


def percent(values: Any, digits: int = 2) -> str:
    return f"{100 * mean(values):.{digits}f} %"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loader = [(torch.rand(10, 784), torch.randint(0, 10, (10,))) for _ in range(3)]
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        names: dict[str, Any] = {"loader": loader}
        exec(code, names)
        assert sum(w.connections for _, w in sparse_weights(names["model"])) < 0.5 * 266_200
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_cuts_are_those_that_were_measured() -> None:
    table = rows("trained with")
    assert tuple(table) == CUT
    for name, cells in table.items():
        runs = RESULTS[name]
        assert [run["seed"] for run in runs] == [0, 1, 2]
        cuts = [
            percent(run["cuts"][d]["accuracy"] for run in runs) for d in ("0.05", "0.02", "0.01")
        ]
        assert cells == [percent(run["accuracy_before"] for run in runs), *cuts]
        for run in runs:
            assert [sum(cut["connections"].values()) for cut in run["cuts"].values()] == [
                13310,
                5324,
                2662,
            ]
    for density in ("0.05", "0.02", "0.01"):  # what the paper claims, on this network
        best = [
            mean(run["cuts"][density]["accuracy"] for run in RESULTS[name])
            for name in ("HALO", "magnitude")
        ]
        assert best[0] > best[1]


def test_ternary_networks_are_as_measured() -> None:
    table = rows("network")
    assert tuple(table) == (*PACKED, *DENSE)
    for name, cells in table.items():
        runs = RESULTS[name]
        assert [run["seed"] for run in runs] == [0, 1, 2]
        size = mean(run[DENSE.get(name, "bytes")] for run in runs)
        each = ", ".join(f"{100 * run['accuracy']:.2f}" for run in runs)
        share = percent((1 - run["density"] for run in runs), 1)
        smaller = [f"{runs[0][kind] / size:.1f}" for kind in ("binary_bytes", "ternary_bytes")]
        assert cells == [
            percent(run["accuracy"] for run in runs),
            each,
            share,
            f"{size:,.0f}",
            *smaller,
        ]
        for run in runs:
            assert run["accuracy"] == pytest.approx(run["accuracy_before"], abs=2e-4), (
                "finalize changes no output"
            )

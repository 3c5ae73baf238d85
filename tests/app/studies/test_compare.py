"""The command, with real runs: tables, searches, equal multiply-adds, failures, bad input."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from rewire.app.cli import run
from rewire.app.studies.store import Store

pytestmark = pytest.mark.slow

SMALL = ["--model", "mlp:30", "--epochs", "4", "--batch-size", "50"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


def compare(*arguments: str) -> int:
    return run(["compare", *SMALL, "--study", "s", *arguments])


def trials() -> list[FrozenTrial]:
    store = Store("sqlite:///runs/s/study.db", print)
    studies = [s.study_name for s in store.storage.get_all_studies()]
    found = [t for name in studies for t in store.ledger(name)._trials()]
    store.close()
    return found


def lines() -> list[dict[str, str]]:
    with open("runs/s/table.csv", newline="") as file:
        return list(csv.DictReader(file))


def of_stage(found: Sequence[FrozenTrial], stage: str) -> list[FrozenTrial]:
    return [t for t in found if t.user_attrs["stage"] == stage]


def test_a_study_and_what_it_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--methods", "static,set,noiseout", "--densities", "0.05,0.2", "--seeds", "2")
    assert compare(*arguments) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert "10/10" in told.out
    assert "left" in told.out
    table = lines()
    assert len(table) == 2 * (2 * 2 + 1)
    for line in table:
        assert 0 < float(line["test_accuracy"]) <= 1
        assert int(line["peak_memory_bytes"]) > 0
        assert float(line["inference_ms"]) > 0
        result = json.loads(
            next(
                p
                for p in Path("runs/s/runs").glob(f"run-{line['method']}-*seed-{line['seed']}-*")
                if not line["density"] or f"-{100 * float(line['density']):g}-digits" in p.name
            )
            .joinpath("result.json")
            .read_text()
        )
        assert result["test_accuracy"] == float(line["test_accuracy"])
        if line["method"] == "static":  # three products of every connection a sample
            adds = 3 * result["connections"] * result["info"]["samples"]["train"] * 4
            assert int(line["training_multiply_adds"]) == adds
    page = Path("runs/s/report.html").read_text()
    assert len(page) < 1_000_000
    before = {p: p.stat().st_mtime_ns for p in Path("runs/s/runs").rglob("*.json")}
    # the same command again trains nothing, and one more method only that
    assert compare(*arguments, "--table", "csv") == 0
    assert capsys.readouterr().out == Path("runs/s/table.csv").read_text()
    assert {p: p.stat().st_mtime_ns for p in Path("runs/s/runs").rglob("*.json")} == before
    assert compare("--methods", "static,set,noiseout,mest", *arguments[2:], "--jobs", "0") == 0
    waiting = [t for t in trials() if t.state == TrialState.WAITING]
    assert {t.user_attrs["method"] for t in waiting} == {"mest"}
    assert len(waiting) == 4


def test_a_search_with_equal_trials_then_fresh_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--methods", "static,set", "--seeds", "2", "--tune", "5", "--untuned") == 0
    found = trials()
    searched = of_stage(found, "tune")
    for method in ("static", "set"):
        own = [t for t in searched if t.user_attrs["method"] == method]
        assert len(own) == 5
        assert all(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in own)
        assert "set.fraction" in own[0].params or method == "static"
        # the first has the defaults, so a search is never worse on the validation samples
        assert own[0].params["lr"] == 0.01
        assert own[0].params["init"] == "auto"
        assert {t.user_attrs["seed"] for t in own} == {2}
        assert len({t.params["lr"] for t in own}) == 5
        best = max(
            (t for t in own if t.state == TrialState.COMPLETE), key=lambda t: (t.value, -t.number)
        )
        runs = [t for t in of_stage(found, "run") if t.user_attrs["label"] == f"{method} (tuned)"]
        assert {t.user_attrs["seed"] for t in runs} == {0, 1}
        assert {t.user_attrs["options"]["lr"] for t in runs} == {best.params["lr"]}
        # a search sees no test score
        assert all("score" not in t.user_attrs.get("outcome", {}) for t in own)
    assert len(lines()) == 8
    assert "static (tuned)" in capsys.readouterr().out


def test_equal_multiply_adds() -> None:
    assert compare("--methods", "static,gmp,mest", "--densities", "0.1", "--seeds", "1",
                   "--epochs", "12", "--match", "multiply-adds") == 0  # fmt: skip
    table = {line["method"]: line for line in lines()}
    assert int(table["static"]["epochs"]) == 12
    assert 1 <= int(table["gmp"]["epochs"]) < 12  # it begins with all connections
    wanted = int(table["static"]["training_multiply_adds"])
    assert table["mest"]["training_multiply_adds"] == table["static"]["training_multiply_adds"]
    # its schedule has another shape in a shorter run, so it is near and not equal
    assert abs(int(table["gmp"]["training_multiply_adds"]) / wanted - 1) < 0.3


def test_a_run_that_fails_is_said_and_the_others_are_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--methods", "static,set", "--seeds", "1", "--set", "set.fraction=0.2"]
    plan = Path("plan.yaml")
    plan.write_text(
        "methods: [static, {method: set, train: {lr: 1.0e+38, optimizer: sgd}}]\nseeds: 1\n"
    )
    assert compare("--config", str(plan)) == 1
    told = capsys.readouterr()
    assert "training diverged" in told.err
    assert told.err.endswith("error: 1 of 2 runs failed, as said above\n")
    assert [line["method"] for line in lines()] == ["static"]
    assert "failed" in Path("runs/s/table.md").read_text()
    assert compare(*arguments) == 0  # another setting is another run


BAD: list[tuple[list[str], str]] = [
    ([], "give the methods to compare"),
    (["--methods", "sett"], "--methods: unknown name 'sett' (did you mean 'set'?)"),
    (["--methods", "set", "--tune", "x"], "--tune: given 'x'"),
    (["--methods", "set", "--jobs", "-1"], "--jobs: given -1, allowed is a whole number from 0"),
    (["--methods", "set", "--table", "word"], "--table: given 'word', allowed are terminal"),
    (["--methods", "set", "--study", "a/b"], "--study: given 'a/b', allowed are letters"),
    (["--methods", "set", "--recipe", "x"], "--recipe: unknown name 'x'"),
    (["--methods", "set", "--config", "none.yaml"], "cannot read none.yaml"),
    (["--methods", "set", "--storage", "what"], "--storage what: "),
    (["--methods", "deep-r", "--weight-decay", "0.1"], "deep-r 10 % digits mlp:30: --method"),
    (["--methods", "set", "--set", "set.fraction=3"], "fraction must be a finite number between"),
]


@pytest.mark.parametrize(("arguments", "told"), BAD, ids=[" ".join(a[-2:]) for a, _ in BAD])
def test_bad_input_is_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1
    assert not Path("runs/s/runs").exists()


def test_a_study_of_another_version_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--methods", "static", "--seeds", "1", "--jobs", "0")
    assert compare(*arguments) == 0
    store = Store("sqlite:///runs/s/study.db", print)
    store.ledger("s").study.set_user_attr("rewire_format", 2)
    store.close()
    before = Path("runs/s/study.db").read_bytes()
    capsys.readouterr()
    assert compare(*arguments) == 2
    assert "has format 2, this version of rewire reads 1" in capsys.readouterr().err
    assert Path("runs/s/study.db").read_bytes() == before


def values(path: str) -> Any:
    return json.loads(Path(path).read_text())


def test_recipes_are_listed_and_two_run_reduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes"]) == 0
    told = capsys.readouterr().out
    for recipe in ("defaults", "set-against-static"):
        assert recipe in told
        less = "--data digits --methods static,set --densities 0.1 --seeds 2 --epochs 2 --tune 0"
        code = run(["compare", "--recipe", recipe, *less.split(), "--model", "mlp:30"])
        assert code == 0
        plan = values(f"runs/{recipe}/plan.json")
        assert plan["claim"]
        assert plan["seeds"] == [0, 1]
    assert "report" in capsys.readouterr().out

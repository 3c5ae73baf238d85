"""What the command line says of itself: methods, versions, options, and words that it completes."""

import json

import pytest
from test_cli import fails, works

from rewire.app import cli
from rewire.app.train.config import TrainConfig, option_name, options


def test_methods(capsys, monkeypatch) -> None:
    from rewire.app.train import baselines as methods

    monkeypatch.setenv("COLUMNS", "200")
    table = works(capsys, "methods")
    monkeypatch.setenv("COLUMNS", "80")
    narrow = works(capsys, "methods")
    assert len(narrow.splitlines()) < 4 * len(methods.available())
    rows = json.loads(works(capsys, "methods", "--json"))
    assert [row["name"] for row in rows] == methods.available()
    for row in rows:
        assert row["name"] in table
        assert row["name"] in narrow
        assert row["memory"] in ("O(K)", "O(M)")
        assert row["paper"]
        assert row["summary"]
        assert row["guarantees"]
    assert "l1" in next(row for row in rows if row["name"] == "deep-r")["parameters"]


def test_version_and_help(capsys) -> None:
    import torch

    out = works(capsys, "--version").splitlines()
    assert out[0].startswith("rewire ")
    assert out[1] == f"torch {torch.__version__}"
    assert out[2].startswith("kernels: ")
    text = works(capsys, "train", "--help")
    for panel in (
        "Data",
        "Network and budget",
        "Method",
        "Training",
        "Run",
        "--resume",
        "300,100]",
    ):
        assert panel in text


def test_one_method_with_its_parameters(capsys) -> None:
    out = works(capsys, "methods", "set")
    assert "fraction = 0.3" in out
    assert "starts: from an ordinary dense model" in works(capsys, "methods", "halo")
    assert "did you mean 'set'" in fails(capsys, "methods", "sett")


def test_each_field_of_the_configuration_is_an_option(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = works(capsys, "train", "--help")
    for field in TrainConfig.model_fields:
        (line,) = (row for row in text.splitlines() if option_name(field) in row.split()[1:3])
        assert options()[field].help.split("[")[0] in line
    assert list(options()) == list(TrainConfig.model_fields)


@pytest.mark.parametrize(
    ("words", "found"), [("rewire be", "bench"), ("rewire train --chec", "--checkpoint-every")]
)
def test_the_shell_completes(monkeypatch, capsys, words: str, found: str) -> None:
    monkeypatch.setenv("_REWIRE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit):
        cli.run([])
    assert capsys.readouterr().out.split() == [found]

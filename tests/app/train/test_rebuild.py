"""The network of a finished run comes back from its folder and answers as it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from rewire.app.data import Dataset
from rewire.app.errors import RunFileError
from rewire.app.train import loop
from rewire.app.train.config import make_config
from rewire.app.train.metrics import evaluate
from rewire.app.train.rebuild import load_network
from rewire.app.train.run_dir import RunDir

RUNS: dict[str, dict[str, Any]] = {
    "sparse": {"method": "set", "density": [0.2]},
    "shrinking": {"method": "one-shot", "density": [0.2]},
    "cut": {"method": "halo", "density": [0.2]},
    "units": {"method": "noiseout", "method_options": {"required_score": 0.0, "at_once": 2}},
    "dense": {"method": "dense"},
    "small": {"method": "small-dense", "density": [0.2]},
    "lstm": {"model": "lstm:6", "method": "deep-r", "batch_size": 500},
    "excluded": {"method": "set", "exclude": ["4"]},
}


@pytest.mark.parametrize("name", RUNS)
def test_it_answers_as_it_did(tmp_path: Path, name: str) -> None:
    options = {"epochs": 2, "batch_size": 200, "threads": 1, **RUNS[name]}
    if "model" not in options:
        options["hidden"] = [12, 9]
    result = loop.run(make_config(options), toy.dataset(), RunDir(tmp_path))
    model, scaling = load_network(tmp_path)
    assert scaling == {}
    x = toy.dataset().test_x
    if "model" in options:
        x = x.view(-1, 8, 8)
    assert evaluate(model, x, toy.dataset().test_y) == (
        result["test_loss"],
        result["test_accuracy"],
    )


def test_targets_of_a_regression_come_back(tmp_path: Path) -> None:
    x = torch.randn(60, 3)
    y = 100 + 20 * x[:, :1]
    data = Dataset("line", x, y, x, y, standardise=True)
    config = make_config({"hidden": "none", "density": [1.0], "epochs": 40, "method": "static"})
    result = loop.run(config, data, RunDir(tmp_path))
    model, scaling = load_network(tmp_path)
    inputs = (x - scaling["inputs.mean"]) * scaling["inputs.factor"]
    found = model(inputs) / scaling["targets.factor"] + scaling["targets.mean"]
    assert result["test_r2"] > 0.9
    error = (found - y).square().mean() / y.var(correction=0)
    assert error.item() == pytest.approx(1 - result["test_r2"], abs=1e-4)


def test_what_is_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="cannot read"):
        load_network(tmp_path)
    config = make_config({"hidden": [5], "epochs": 1, "batch_size": 500, "threads": 1})
    loop.run(config, toy.dataset(), RunDir(tmp_path))
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(RunFileError, match="is damaged"):
        load_network(tmp_path)

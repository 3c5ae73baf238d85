"""Methods that start from a dense network, behind the command line."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import toy
from rewire.app.errors import StoppedError, TrainError
from rewire.app.train import loop
from rewire.app.train.config import make_config
from rewire.app.train.run_dir import RunDir

pytest.importorskip("torch_pruning")

DENSE: dict[str, Any] = {
    "method": "noiseout",
    "hidden": [12, 9],
    "epochs": 4,
    "batch_size": 250,
    "lr": 0.01,
    "optimizer": "adam",
    "threads": 1,
    "method_options": {"required_score": 0.0, "at_once": 2, "every": 4},
}


def run(
    folder: Path, *, resume: bool = False, stop: Any = lambda: 0, **changes: Any
) -> dict[str, Any]:
    return loop.run(
        make_config(DENSE | changes), toy.dataset(), RunDir(folder), resume=resume, stop=stop
    )


def test_a_dense_network_gets_smaller(tmp_path: Path) -> None:
    result = run(tmp_path)
    _, metrics, _ = toy.outcome(tmp_path)
    first, last = metrics[0]["connections"], metrics[-1]["connections"]
    assert sum(last) < sum(first) < 64 * 12 + 12 * 9 + 9 * 10
    assert sum(metrics[1]["dropped"]) == sum(first) - sum(metrics[1]["connections"])
    assert result["connections"] == sum(last)
    assert result["possible_connections"] == 64 * 12 + 12 * 9 + 9 * 10
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert sum(tensors[f"{i}.weight"].numel() for i in (0, 2, 4)) == sum(last)


HALO: dict[str, Any] = {"method": "halo", "optimizer": "sgd", "method_options": {"after_epochs": 2}}


@pytest.mark.parametrize("changes", [{}, HALO])
@pytest.mark.parametrize("at", [3, 6, 9])
def test_stopped_and_resumed_it_is_the_same_run(
    tmp_path: Path, at: int, changes: dict[str, Any]
) -> None:
    run(tmp_path / "whole", **changes)
    calls = iter(range(10**6))
    with contextlib.suppress(StoppedError):
        run(tmp_path / "parts", stop=lambda: 15 if next(calls) == at else 0, **changes)
    assert not (tmp_path / "parts" / "result.json").exists()
    run(tmp_path / "parts", resume=True, **changes)
    assert toy.outcome(tmp_path / "parts") == toy.outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": [0.2]}, "--density: noiseout starts from a dense network"),
        ({"connections": 100}, "--connections: noiseout starts"),
        ({"distribution": "erk"}, "--distribution: noiseout starts"),
        ({"init": "sparse"}, "--init: noiseout starts"),
        ({"validation": 0}, "--validation: noiseout decides by the validation accuracy"),
        ({"method_options": {"targets": "pink"}}, "--method noiseout: targets must be"),
        ({"method_options": {"only": "7"}}, "--method noiseout: the model has no layer '7'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError, match=message):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("density", "left"), [(None, 97), (0.25, 242)])
def test_density_is_the_budget_of_methods_that_have_one(
    tmp_path: Path, density: float | None, left: int
) -> None:
    """With the default of all methods where nothing is said, so that runs with the same options
    compare.
    """
    changes = {} if density is None else {"density": [density]}
    result = run(tmp_path, method="halo", method_options={}, epochs=1, **changes)
    assert result["possible_connections"] == 64 * 12 + 12 * 9 + 9 * 10
    assert result["connections"] == left
    said = run(tmp_path / "said", method="halo", method_options={"density": left / 966}, epochs=1)
    assert said["connections"] == left
    assert said["test_loss"] == result["test_loss"]


def test_the_cut_of_halo_shows_in_its_epoch_and_the_rest_trains_on(tmp_path: Path) -> None:
    result = run(tmp_path, method="halo", method_options={}, density=[0.25])
    _, metrics, _ = toy.outcome(tmp_path)
    assert [sum(line["connections"]) for line in metrics] == [966, 966, 242, 242], (
        "4 epochs, cut after 3"
    )
    assert [sum(line["dropped"]) for line in metrics] == [0, 0, 966 - 242, 0]
    assert result["connections"] == 242
    assert metrics[3]["train_loss"] != metrics[2]["train_loss"]


@pytest.mark.parametrize("method", ["differentiable", "halo", "ternary"])
def test_the_other_dense_methods_run(tmp_path: Path, method: str) -> None:
    result = run(tmp_path, method=method, method_options={}, epochs=1)
    assert 0 < result["connections"] <= result["possible_connections"]

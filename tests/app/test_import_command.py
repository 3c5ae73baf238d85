"""`rewire import`: weights of other programs become a state that `rewire train` goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune

import rewire
from rewire.app import cli
from rewire.app.train.rebuild import load_network

QUICK = ["--epochs", "1", "--batch-size", "300", "--threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(["import", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))


def test_a_pruned_network_is_imported_and_trained_further(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = perceptron()
    prune.l1_unstructured(model[0], "weight", amount=0.75)
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    torch.save(model.state_dict(), "pruned.pt")
    assert cli.run(["import", "pruned.pt", "sparse.safetensors"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "0.weight                 20 x 64, 320 connections (25.00%)"
    assert "420 of 1,480 connections (28.38%), 2 other tensors" in out[2]
    size = Path("sparse.safetensors").stat().st_size
    assert out[3].endswith(f"sparse.safetensors, {size:,} bytes")
    Path("imported_net.py").write_text(
        "import rewire\nfrom torch import nn\n\ndef make():\n"
        "    model = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))\n"
        "    return nn.Sequential(nn.Flatten(), rewire.load(model, 'sparse.safetensors'))\n"
    )
    told = ["--model", "imported_net:make", "--method", "set", "--run-dir", "run"]
    assert cli.run(["train", *QUICK, *told]) == 0
    trained, _ = load_network(Path("run"))
    assert {n: w.connections for n, w in rewire.sparse_weights(trained)} == {
        "1.0.weight": 320,
        "1.2.weight": 100,
    }


def test_options_and_lists_of_edges(capsys: pytest.CaptureFixture[str]) -> None:
    safetensors.torch.save_file(perceptron().state_dict(), "dense.safetensors")
    given = ["--density", "0.5", "--distribution", "uniform", "--only", "0.*"]
    assert cli.run(["import", "dense.safetensors", "a.safetensors", *given]) == 0
    state = safetensors.torch.load_file("a.safetensors")
    assert state["0.weight.values"].shape == (640,)
    assert state["2.weight"].shape == (10, 20)
    Path("e.csv").write_text("source,target,value\n1,0,0.5\n2,1,-1\n")
    capsys.readouterr()
    assert "give it with shapes=, on the command line --shape weight=" in fails(
        capsys, "e.csv", "b.safetensors"
    )
    assert cli.run(["import", "e.csv", "b.safetensors", "--shape", "fc.weight=2x5"]) == 0
    found = safetensors.torch.load_file("b.safetensors")
    assert found["fc.weight.shape"].tolist() == [2, 5]
    assert found["fc.weight.values"].tolist() == [0.5, -1.0]


def test_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    safetensors.torch.save_file(perceptron().state_dict(), "dense.safetensors")
    out = "a.safetensors"
    assert "say what to keep with --density, --connections or --threshold" in fails(
        capsys, "dense.safetensors", out
    )
    assert "allowed are .safetensors, .npz, .parquet, .csv, .pt" in fails(capsys, "a.xyz", out)
    assert "use .safetensors" in fails(capsys, "dense.safetensors", "a.npz")
    assert "allowed is NAME=ROWSxCOLS" in fails(capsys, "e.csv", out, "--shape", "3x5")
    assert "cannot read or write none.npz" in fails(capsys, "none.npz", out)
    assert "cannot be read, allowed are sparse" in fails(capsys, "a", out, "--format", "onyx")
    assert not Path(out).exists()

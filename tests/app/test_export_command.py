"""`rewire export`: what a finished run leaves becomes C source and a program."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rewire.app import cli, data
from rewire.app.train.rebuild import load_network
from rewire.export import read
from rewire.export.lists.entries import entries_of
from rewire.nn import sparse_weights

QUICK = ["--hidden", "10", "--epochs", "2", "--batch-size", "300", "--threads", "1", "--quiet"]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(arguments) == 2
    return capsys.readouterr().err.removeprefix("error: ").rstrip()


@pytest.mark.parametrize("method", ["deep-r", "ternary"])
def test_a_run_becomes_c_and_a_program(
    method: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(tmp_path / "run")
    assert cli.run(["train", *QUICK, "--method", method, "--run-dir", folder]) == 0
    capsys.readouterr()
    out, program = tmp_path / "out", tmp_path / "digits.pt2"
    told = ["--c", str(out), "--name", "digits", "--values", "int8", "--program", str(program)]
    assert cli.run(["export", folder, *told]) == 0
    printed = capsys.readouterr().out
    assert "int8 weights" in printed
    assert f"{program.stat().st_size:,} bytes" in printed
    x = data.load("digits").test_x[:20]
    with torch.no_grad():
        expected = load_network(Path(folder))[0](x)
        run = torch.export.load(program).module()
        torch.testing.assert_close(run(x), expected, rtol=0.05, atol=0.05)
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler (cc) here")
    built = tmp_path / "digits"
    source = str(out / "digits.c")
    subprocess.run(["cc", "-std=c99", "-DDIGITS_MAIN", source, "-o", built, "-lm"], check=True)
    text = "\n".join(" ".join(map(str, row)) for row in x.tolist())
    done = subprocess.run([built], input=text, capture_output=True, text=True, check=True)
    found = torch.tensor([[float(v) for v in line.split()] for line in done.stdout.splitlines()])
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


NETWORK = """
from torch import nn

def make():
    conv = nn.Conv2d(1, 4, 3, padding=1)
    return nn.Sequential(nn.Unflatten(1, (1, 8)), conv, nn.BatchNorm2d(4), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10))
"""


def test_a_network_of_ones_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported_net.py").write_text(NETWORK)
    folder = str(tmp_path / "run")
    quick = ["--epochs", "1", "--batch-size", "300", "--threads", "1", "--quiet"]
    assert cli.run(["train", *quick, "--model", "exported_net:make", "--run-dir", folder]) == 0
    assert any(sparse_weights(load_network(Path(folder))[0]))
    assert cli.run(["export", folder, "--c", str(tmp_path / "out")]) == 0
    header = (tmp_path / "out" / "network.h").read_text()
    assert "#define NETWORK_INPUTS 64\n" in header


def test_refuses_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    nothing, c = str(tmp_path / "none"), str(tmp_path / "out")
    assert "say what to write" in fails(capsys, "export", nothing)
    assert f"cannot read {nothing}" in fails(capsys, "export", nothing, "--c", c)
    assert "allowed are float, int8, ternary" in fails(
        capsys, "export", nothing, "--c", c, "--values", "int4"
    )
    assert "--name belongs to --c" in fails(
        capsys, "export", nothing, "--program", "x.pt2", "--name", "net"
    )
    folder = str(tmp_path / "run")
    assert cli.run(["train", *QUICK, "--run-dir", folder]) == 0
    assert "a name that C allows" in fails(capsys, "export", folder, "--c", c, "--name", "1")
    (tmp_path / "run" / "result.json").unlink()
    assert f"cannot read {folder}/result.json" in fails(capsys, "export", folder, "--c", c)
    assert not (tmp_path / "out").exists()


def test_one_run_in_every_format_of_lists(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", *QUICK, "--run-dir", "run"]) == 0
    places = {
        "sparse": "s.safetensors", "csr": "a.npz", "coo": "b.npz", "scipy": "folder",
        "parquet": "e.parquet", "csv": "e.csv", "state-dict": "d.safetensors",
        "graphml": "g.graphml",
    }  # fmt: skip
    told = [word for name, path in places.items() for word in (f"--{name}", path)]
    assert cli.run(["export", "run", *told]) == 0
    out = capsys.readouterr().out
    for name, path in places.items():
        file = Path(path)
        size = sum(f.stat().st_size for f in ([file] if file.is_file() else file.iterdir()))
        assert f"{name:<14} {path}, {size:,} bytes" in out
    trained = dict(sparse_weights(load_network(Path("run"))[0]))
    for path in ("s.safetensors", "a.npz", "b.npz", "folder"):
        entries = entries_of(read(path))
        for name, weight in trained.items():
            assert torch.equal(entries[name].values, weight.coo()[2])
    assert "--dense belongs to --state-dict" in fails(capsys, "export", "run", *told[:2], "--dense")

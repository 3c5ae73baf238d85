"""The command line as users meet it: one clear line for everything that is wrong, and nothing
lost.
"""

import json
import os
import resource
import signal
import textwrap
from pathlib import Path

import pytest

from interpreter import run_python
from rewire.app import cli
from rewire.app.train import display
from rewire.storage import files

QUICK = ["--hidden", "10", "--epochs", "2", "--batch-size", "300", "--threads", "1"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Run a command that must fail, with one line on stderr; returns the line."""
    assert cli.run(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip()


def works(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_without_a_command_the_help_is_printed_and_no_empty_error(capsys) -> None:
    assert cli.run([]) == 2
    captured = capsys.readouterr()
    assert "Usage" in captured.out
    assert captured.err == ""


def test_a_run_from_beginning_to_end(capsys, tmp_path: Path) -> None:
    out = works(capsys, "train", *QUICK)
    lines = out.splitlines()
    assert lines[0].startswith(
        "64-10-10, 74 of 740 connections (10.00%); 1,298 training, 144 validation, 355 test"
    )
    assert [line.split()[:2] for line in lines[1:3]] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert all(
        word in lines[1]
        for word in ("validation accuracy", "train loss", "connections 74", "turnover")
    )
    assert [line.split()[0] for line in lines[3:]] == ["test", "connections", "seconds", "report"]
    folder = tmp_path / "runs" / "digits-deep-r-0"
    assert lines[-1].endswith("runs/digits-deep-r-0/report.html")
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "checkpoint.json",
        "result.json",
        "report.html",
        "model.safetensors",
    }
    result = json.loads((folder / "result.json").read_text())
    assert result["connections"] == 74
    assert result["density"] == 0.1
    assert result["seed"] == 0
    assert set(result["versions"]) == {"rewire", "torch", "numpy", "python", "kernels"}
    assert len(result["config_sha256"]) == 64
    assert 0 <= result["test_accuracy"] <= 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    works(capsys, "train", *QUICK)
    assert (tmp_path / "runs" / "digits-deep-r-0-2" / "result.json").exists()


def test_the_defaults_do_well(capsys) -> None:
    works(capsys, "train", "--density", "0.02", "--run-dir", "r", "--quiet")
    assert json.loads(Path("r/result.json").read_text())["test_accuracy"] > 0.94


def test_resuming_what_is_finished_says_so(capsys) -> None:
    works(capsys, "train", *QUICK, "--run-dir", "r")
    before = Path("r/result.json").read_bytes()
    Path("r/report.html").unlink()  # as if killed before it was written
    out = works(capsys, "train", "--resume", "--run-dir", "r")
    assert out.startswith("the run in r is finished\ntest accuracy")
    assert Path("r/report.html").exists()
    assert Path("r/result.json").read_bytes() == before
    assert works(capsys, "train", "--resume", "--run-dir", "r", *QUICK, "--quiet") == ""
    assert fails(capsys, "train", "--resume", "--run-dir", "r", "--lr", "0.2") == (
        "--resume: --lr: the run has 0.1, given 0.2; leave the option out, or start another run "
        "with another --run-dir"
    ).replace("0.1,", f"{json.loads(Path('r/config.json').read_text())['lr']},")
    assert "--set: the run has l1=0.1, given l1=1.0" in fails(
        capsys, "train", "--resume", "--run-dir", "r", "--set", "l1=1"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--method", "deepr"],
            "--method: unknown name 'deepr' (did you mean 'deep-r'?); allowed are ",
        ),
        (
            ["--data", "minst"],
            "--data: unknown name 'minst' (did you mean 'mnist'?); allowed are digits, mnist",
        ),
        (
            ["--distribution", "ekr"],
            "--distribution: unknown name 'ekr' (did you mean 'er'?); allowed are",
        ),
        (
            ["--optimizer", "sdg"],
            "--optimizer: unknown name 'sdg' (did you mean 'sgd'?); allowed are sgd",
        ),
        (["--optimiser", "sgd"], "No such option: --optimiser (Possible options: --optimizer)"),
        (
            ["--density", "0"],
            "--density: given 0, allowed is a number greater than 0 and at most 1",
        ),
        (["--density", "-0.5"], "--density: given -0.5, allowed is"),
        (["--density", "1.01"], "--density: given 1.01, allowed is"),
        (["--density", "nan"], "--density: given nan, allowed is"),
        (
            ["--density", "a,b"],
            "--density: given 'a,b', allowed is a number greater than 0 and at most 1, or one",
        ),
        (["--density", "0.1,0.1"], "--density: given 2 numbers for 3 layers"),
        (
            ["--density", "1e-7"],
            "--density 1e-07: 0 connections for layer 1 (64 inputs, 300 outputs)",
        ),
        (
            ["--density", "0.1,0.1,1e-9"],
            "--density: 1e-09 gives layer 3 (100 inputs, 10 outputs) 0 connections",
        ),
        (["--connections", "60000"], "--connections 60000: 60000 connections for layer 1"),
        (["--connections", "many"], "--connections: given 'many', allowed is a whole number"),
        (["--fan-in", "0"], "--fan-in: given 0, allowed is a number greater than 0"),
        (["--block", "4,4"], "--block: given 4,4, allowed is three whole numbers greater than 0"),
        (
            ["--method", "rigl", "--set", "until=-1"],
            "--method rigl: until must be a whole number of steps of at least 0, or None, not -1",
        ),
        (
            ["--block", "4,4,x"],
            "--block: given '4,4,x', allowed is three whole numbers greater than 0",
        ),
        (
            ["--fan-in", "2"],
            "--fan-in, --fan-out, --block: layer 1 (64 inputs, 300 outputs) gets 2091 connections",
        ),
        (["--start-density", "0.5"], "--start-density: deep-r has its budget from the start"),
        (
            ["--hidden", "300,x"],
            "--hidden: given '300,x', allowed is sizes from 1 to 2^40 - 1 such as 300,100",
        ),
        (["--hidden", "300,0"], "--hidden: given 0, allowed is"),
        (["--epochs", "1.5"], "--epochs: given '1.5', allowed is a whole number"),
        (["--lr", "fast"], "--lr: given 'fast', allowed is a number"),
        (["--lr", "nan"], "--lr: given nan, allowed is a finite number"),
        (
            ["--validation", "0.0001"],
            "--validation: 0.0001 of 1442 samples is less than one; 0 turns it off",
        ),
        (["--validation", "0.9999"], "--validation: 0.9999 leaves no sample to train on"),
        (["--set", "l1"], "--set l1: write it as name=value"),
        (["--set", "l2=1"], "--set l2: deep-r has no such parameter"),
        (["--set", "l1=x"], "--set l1=x: allowed is a number"),
        (["--set", "l1=-1"], "--method deep-r: "),
        (
            ["--weight-decay", "0.1"],
            "--method deep-r: DeepR must not be combined with weight decay",
        ),
        (["--data", "mnist", "--data-dir", "nowhere"], "--data-dir"),
        (["--resume"], "--resume: give the run with --run-dir FOLDER"),
        (
            ["--resume", "--run-dir", "r"],
            "--resume: there is no run in r; leave --resume out to start one",
        ),
        (
            ["--resume", "--overwrite", "--run-dir", "r"],
            "--resume goes on with a run, --overwrite replaces it",
        ),
        (["surplus"], "Got unexpected extra argument"),
        (["--lr"], "Option '--lr' requires an argument."),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(
    capsys, tmp_path: Path, arguments, line: str
) -> None:
    assert line in fails(capsys, "train", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_bad_commands(capsys) -> None:
    assert "No such command 'trian'" in fails(capsys, "trian")
    assert fails(capsys, "report", "nowhere") == "there is no run in nowhere: it has no config.json"
    assert "Missing argument" in fails(capsys, "report")


def test_an_existing_run_is_not_touched(capsys) -> None:
    works(capsys, "train", *QUICK, "--run-dir", "r")
    Path("r/mine.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in Path("r").iterdir()}
    assert fails(capsys, "train", *QUICK, "--run-dir", "r") == (
        "--run-dir r already has a run; continue it with --resume, replace it with --overwrite, "
        "or choose another folder"
    )
    fails(capsys, "train", *QUICK, "--run-dir", "r", "--overwrite", "--density", "1e-7")
    assert {path.name: path.read_bytes() for path in Path("r").iterdir()} == before
    works(capsys, "train", *QUICK, "--run-dir", "r", "--overwrite", "--seed", "5")
    assert json.loads(Path("r/result.json").read_text())["seed"] == 5
    assert Path("r/mine.txt").read_text() == "mine"
    assert len(list(Path("r").glob("checkpoint-*"))) == 1


def test_run_dir_that_cannot_be(capsys) -> None:
    Path("file").write_text("")
    assert fails(capsys, "train", *QUICK, "--run-dir", "file") == (
        "--run-dir file: this is a file, needed is a folder"
    )
    assert fails(capsys, "train", *QUICK, "--run-dir", "file/r") == (
        "cannot read or write file/r: Not a directory"
    )
    if Path("/proc/self").exists():
        assert ("cannot read or write /proc/r: ") in fails(
            capsys, "train", *QUICK, "--run-dir", "/proc/r"
        )


def test_damaged_checkpoint(capsys, monkeypatch) -> None:
    works(capsys, "train", *QUICK, "--run-dir", "r")
    Path("r/result.json").unlink()
    (tensors,) = Path("r").glob("checkpoint-*")
    good = tensors.read_bytes()
    tensors.write_bytes(good[:1000])
    line = fails(capsys, "train", "--resume", "--run-dir", "r")
    assert f"checkpoint {tensors} is damaged: sha256 {files.sha256_bytes(good[:1000])}" in line
    assert f"expected {files.sha256_bytes(good)}" in line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_and_resumed_by_the_command_it_prints(
    capsys, monkeypatch, number, code
) -> None:
    works(capsys, "train", *QUICK, "--run-dir", "whole")
    former = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(display.Lines, "epoch_ended", lambda *_: os.kill(os.getpid(), number))
        line = fails(capsys, "train", *QUICK, "--run-dir", "a run", code=code)
    assert signal.getsignal(number) == former
    told = "stopped after step 5; the last checkpoint is whole, go on with: "
    assert line == told + "rewire train --resume --run-dir 'a run'"
    assert "resumed after step 5 of 10" in works(capsys, "train", "--resume", "--run-dir", "a run")
    for name in ("model.safetensors", "checkpoint-10.safetensors"):
        assert (Path("whole") / name).read_bytes() == (Path("a run") / name).read_bytes()


def test_stopped_while_loading(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "rewire.app.data.load", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
    )
    assert fails(capsys, "train", *QUICK, "--run-dir", "r", code=130) == "stopped"
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_last_checkpoint(capsys) -> None:
    """The system itself refuses the write: no file of this process may grow beyond the limit."""
    works(capsys, "train", *QUICK, "--run-dir", "whole")
    options = ["train", *QUICK, "--run-dir", "r", "--batch-size", "500"]
    script = textwrap.dedent(
        f"""
        import resource, sys
        from rewire.app import cli
        from rewire.app.train import display
        def limit(self, record):
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        display.Lines.epoch_ended = limit
        sys.exit(cli.run({options!r}))
        """
    )
    done = run_python(script)
    assert done.returncode == 2
    assert done.stderr == (
        "error: cannot read or write r/checkpoint-6.safetensors: File too large; make room; the "
        "last checkpoint "
        "is whole, go on with: rewire train --resume --run-dir r\n"
    )
    assert {path.name for path in Path("r").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.json",
        "checkpoint-3.safetensors",
    }
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    works(capsys, "train", "--resume", "--run-dir", "r")
    works(capsys, "train", *options[1:], "--run-dir", "again")
    assert Path("r/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_divergence_is_said(capsys) -> None:
    line = fails(
        capsys,
        "train",
        *QUICK,
        "--method",
        "static",
        "--lr",
        "1e30",
        "--run-dir",
        "r",
        "--epochs",
        "4",
    )
    assert "training diverged in epoch" in line
    assert "try a smaller --lr (it is 1e+30)" in line


def test_linear_model_and_every_optimizer(capsys) -> None:
    for optimizer in ("sgd", "adam", "adamw", "rmsprop"):
        out = works(
            capsys,
            "train",
            "--hidden",
            "none",
            "--epochs",
            "1",
            "--batch-size",
            "300",
            "--optimizer",
            optimizer,
            "--lr",
            "0.01",
            "--no-bias",
            "--validation",
            "0",
            "--run-dir",
            optimizer,
            "--connections",
            "100",
        )
        assert out.startswith("64-10, 100 of 640 connections")
        assert "train accuracy" in out


def test_quiet(capsys) -> None:
    assert works(capsys, "train", *QUICK, "--quiet") == ""


def test_report_command(capsys) -> None:
    works(capsys, "train", *QUICK, "--run-dir", "r")
    Path("r/report.html").write_text("old")
    assert works(capsys, "report", "r") == "r/report.html\n"
    assert Path("r/report.html").read_text().startswith("<!DOCTYPE html>")


def test_a_folder_of_somebody_elses_is_not_used(capsys, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for extra in ([], ["--overwrite"]):
        line = fails(capsys, "train", *QUICK, "--run-dir", "mine", *extra)
        assert "thesis.tex" in line
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"my": 1}')
    fails(capsys, "train", *QUICK, "--run-dir", "other", "--overwrite")
    assert (tmp_path / "other" / "config.json").read_text() == '{"my": 1}'


def test_sizes_beyond_reason(capsys) -> None:
    assert "--threads" in fails(capsys, "train", *QUICK, "--threads", "100000")
    assert "--hidden" in fails(capsys, "train", "--hidden", "9" * 20)


def test_files_of_a_run_that_parse_but_lack_something(capsys) -> None:
    works(capsys, "train", *QUICK, "--run-dir", "run")
    result = Path("run/result.json").read_text()
    for damaged in ("{}", "[1]", result[:40]):
        Path("run/result.json").write_text(damaged)
        assert "--resume" in fails(capsys, "train", "--resume", "--run-dir", "run")
        assert "run" in fails(capsys, "report", "run")
    Path("run/result.json").unlink()
    works(capsys, "train", "--resume", "--run-dir", "run")
    before, after = json.loads(result), json.loads(Path("run/result.json").read_text())
    assert before | {"seconds": 0} == after | {"seconds": 0}
    Path("run/metrics.jsonl").write_text('{"epoch": 1}\n')
    assert "damaged" in fails(capsys, "report", "run")

"""The files of a run directory are bound together: what was changed, or is of another run, is
refused by name.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import toy
from rewire.app.errors import ReportError, StoppedError, TrainError
from rewire.app.report.read import read_run
from rewire.app.train import loop
from rewire.app.train.run_dir import RunDir

FINISHED = ("config.json", "metrics.jsonl", "model.safetensors", "result.json", "checkpoint.json")
GOING = ("config.json", "metrics.jsonl", "checkpoint.json", "checkpoint-5.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of two seeds and runs of the same that were stopped."""
    base = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        loop.run(toy.config(seed=seed), toy.dataset(), RunDir(base / f"finished {seed}"))
        asked = iter([0] * 5 + [2] * 5)
        with pytest.raises(StoppedError):
            loop.run(
                toy.config(seed=seed),
                toy.dataset(),
                RunDir(base / f"going {seed}"),
                stop=lambda a=asked: next(a),
            )
    return base


def refused(action: Callable[[], object], *names: str) -> None:
    with pytest.raises((TrainError, ReportError)) as caught:
        action()
    assert any(name in str(caught.value) for name in names), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FINISHED)
def test_a_file_of_another_finished_run(runs: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "r"
    shutil.copytree(runs / "finished 0", folder)
    place = RunDir(folder)
    whole = place.read_result()
    read_run(folder)
    shutil.copy(runs / "finished 1" / name, folder / name)
    refused(place.read_result, name)
    refused(lambda: read_run(folder), name)
    (folder / name).unlink()
    if name == "checkpoint.json":  # which may be deleted
        assert place.read_result() == whole
        return
    refused(place.read_result, name)
    if name == "result.json":  # so the run is not finished any more
        assert read_run(folder).result is None
    else:
        refused(lambda: read_run(folder), name, "no config.json")


def test_all_files_but_one_of_another_run(runs: Path, tmp_path: Path) -> None:
    """Also where the checksums are those of the other run."""
    for name in FINISHED[:4]:
        folder = tmp_path / name
        shutil.copytree(runs / "finished 1", folder)
        shutil.copy(runs / "finished 0" / name, folder / name)
        refused(RunDir(folder).read_result, name)
        refused(lambda folder=folder: read_run(folder), name)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoint.json"])
def test_a_file_of_another_run_that_goes_on(runs: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "r"
    shutil.copytree(runs / "going 0", folder)
    read_run(folder)
    shutil.copy(runs / "going 1" / name, folder / name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    seed = RunDir(folder).read_config().seed

    def resume() -> None:
        loop.run(toy.config(seed=seed), toy.dataset(), RunDir(folder), resume=True)

    refused(resume, name, "config.json", "checkpoint")
    refused(lambda: read_run(folder), name, "config.json", "checkpoint")
    # nothing is lost by trying
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_metrics_without_their_checkpoint(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    shutil.copytree(runs / "going 0", folder)
    (folder / "checkpoint.json").unlink()
    refused(
        lambda: loop.run(toy.config(), toy.dataset(), RunDir(folder), resume=True),
        "checkpoint.json is missing",
    )
    assert (folder / "metrics.jsonl").read_bytes() == (
        runs / "going 0" / "metrics.jsonl"
    ).read_bytes()


def test_what_may_be_changed(runs: Path, tmp_path: Path) -> None:
    """Options that decide nothing, the layout of config.json, and files of other names."""
    for start in ("finished 0", "going 0"):
        folder = tmp_path / start
        shutil.copytree(runs / start, folder)
        text = (folder / "config.json").read_text()
        changed = text.replace('"checkpoint_every": 0', '"checkpoint_every":\t77').replace(
            '"threads": 1', '"threads": 2'
        )
        changed = changed.replace('"data_dir": null', '"data_dir": "/moved"')
        assert len(changed) > len(text)
        (folder / "config.json").write_text(changed)
        (folder / "notes.txt").write_text("mine")
        (folder / "report.html").write_text("mine")
        assert read_run(folder).metrics == read_run(runs / start).metrics
    assert (
        RunDir(tmp_path / "finished 0").read_result() == RunDir(runs / "finished 0").read_result()
    )
    loop.run(RunDir(folder).read_config(), toy.dataset(), RunDir(folder), resume=True)
    assert toy.outcome(folder) == toy.outcome(runs / "finished 0")


def test_a_result_that_was_removed_is_made_anew(runs: Path, tmp_path: Path) -> None:
    for lost in (
        ["result.json"],
        ["result.json", "checksums.json"],
        ["result.json", "model.safetensors"],
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(runs / "finished 0", folder)
        for name in lost:
            (folder / name).unlink()
        loop.run(toy.config(), toy.dataset(), RunDir(folder), resume=True)
        assert toy.outcome(folder) == toy.outcome(runs / "finished 0")
        RunDir(folder).read_result()


def test_nested_locks_of_one_process(tmp_path: Path) -> None:
    place, other = RunDir(tmp_path / "new"), RunDir(tmp_path / "new")
    with place.lock():
        assert not place.path.exists()  # nothing to lock yet
        with place.lock(create=True), place.lock():
            refused(lambda: other.start(toy.config(), overwrite=True), "another process")
        refused(
            lambda: other.start(toy.config(), overwrite=True),
            "another "
            # until the outermost ends
            "process",
        )
        assert list(place.path.iterdir()) == []
    other.start(toy.config(), overwrite=False)
    with pytest.raises(ZeroDivisionError), place.lock():
        1 / 0  # noqa: B018
    other.start(toy.config(), overwrite=True)

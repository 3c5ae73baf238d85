"""A run is a pure function of its options, whatever interrupts it, at whatever write."""

import contextlib
import json
import signal
from pathlib import Path

import pytest

import toy
from rewire.app.errors import StoppedError, TrainError
from rewire.app.run_files import EMPTY
from rewire.app.train import checkpoint, loop
from rewire.app.train.run_dir import RunDir
from rewire.storage import files

WRITES = ("write_bytes", "sync_file", "rename", "remove", "sync_folder")


class Killed(BaseException):
    """Stands for kill -9: nothing that is done afterwards reaches the disk."""


class Killer:
    """Counts the calls that touch the disk and dies at call number `at`, before it, or halfway
    through a write.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, halfway: bool) -> None:
        self.calls, self.at, self.halfway = 0, at, halfway
        for name in WRITES:
            monkeypatch.setattr(files, name, self.wrap(name, getattr(files, name)))

    def wrap(self, name, real):
        def call(*arguments):
            self.calls += 1
            if self.calls == self.at and self.halfway and name == "write_bytes":
                file, content = arguments
                real(file, content[: len(content) // 2])
                file.flush()
            if self.calls >= self.at:
                raise Killed
            return real(*arguments)

        return call


def run(folder: Path, *, resume: bool, **changes) -> None:
    loop.run(toy.config(**changes), toy.dataset(), RunDir(folder), resume=resume)


def resume_whatever_is_there(folder: Path, **changes) -> None:
    """What a user does after a crash: --resume, or a new start if the run had not begun."""
    place = RunDir(folder)
    if not place.is_finished():
        run(folder, resume=place.has_run(), **changes)


RUNS = {
    "deep-r, momentum": {"momentum": 0.9},
    "deep-r, saving within epochs": {"checkpoint_every": 2},
    "ctre": {
        "method": "ctre",
        "method_options": {"variant": "seq", "patience": 1},
        "momentum": 0.9,
        "epochs": 3,
    },
    "set, adam": {
        "method": "set",
        "method_options": {},
        "optimizer": "adam",
        "lr": 0.01,
        "epochs": 3,
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_crash_at_every_write(tmp_path: Path, name: str) -> None:
    """Every second write of two of the runs and the others of the other two: before it in one of a
    pair, halfway through in the other.
    """
    changes, number = RUNS[name], list(RUNS).index(name)
    run(tmp_path / "whole", resume=False, **changes)
    whole = toy.outcome(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        counter = Killer(patch, at=10**9, halfway=False)
        run(tmp_path / "counted", resume=False, **changes)
    assert counter.calls > 40
    assert sum(sum(line["grown"]) for line in whole[1]) > 10  # rewiring is what could go wrong
    assert toy.outcome(tmp_path / "counted") == whole
    # The second write point of every third crash is crashed at again while resuming.
    for turn, at in enumerate(range(1 + number // 2, counter.calls + 1, 2)):
        folder, halfway = tmp_path / str(at), number % 2 == 0
        with pytest.MonkeyPatch.context() as patch:
            Killer(patch, at, halfway)
            with pytest.raises(Killed):
                run(folder, resume=False, **changes)
        if turn % 3 == 0:
            with pytest.MonkeyPatch.context() as patch:
                Killer(patch, 1 + at % 7, halfway)
                # it may be finished, or have fewer writes to make
                with contextlib.suppress(Killed):
                    resume_whatever_is_there(folder, **changes)
        resume_whatever_is_there(folder, **changes)
        assert toy.outcome(folder) == whole, at
        left = {path.name for path in folder.iterdir()}
        assert not [name for name in left if name.startswith(files.TEMPORARY_PREFIX)], at
        assert len([name for name in left if name.startswith("checkpoint-")]) == 1, at


def test_crash_while_overwriting_leaves_the_old_run_or_a_start_of_the_new(tmp_path: Path) -> None:
    for seed in (0, 1):
        run(tmp_path / str(seed), resume=False, seed=seed)
    whole = {seed: toy.outcome(tmp_path / str(seed)) for seed in (0, 1)}
    seen = set()
    for at in range(1, 25):
        folder = tmp_path / f"at {at}"
        run(folder, resume=False, seed=0)
        with pytest.MonkeyPatch.context() as patch:
            Killer(patch, at, halfway=True)
            with pytest.raises(Killed):
                loop.run(toy.config(seed=1), toy.dataset(), RunDir(folder), overwrite=True)
        place = RunDir(folder)
        if place.is_finished():
            assert at == 1
            seed = 0
        elif (folder / "config.json").exists():
            seed = place.read_config().seed
            run(folder, resume=True, seed=seed)
        else:
            with pytest.raises(
                TrainError,
                match=r"start the run again with --overwrite|there is "
                r"no run in",
            ):
                place.read_config()
            seed = 1
            loop.run(toy.config(seed=1), toy.dataset(), RunDir(folder), overwrite=True)
        assert toy.outcome(folder) == whole[seed], at
        seen.add(seed)
    assert seen == {0, 1}


def test_signal_stops_within_an_epoch_and_resumes(tmp_path: Path) -> None:
    run(tmp_path / "whole", resume=False)
    asked = iter([0, 0, 0, signal.SIGINT])
    place = RunDir(tmp_path / "stopped")
    with pytest.raises(StoppedError) as caught:
        loop.run(toy.config(), toy.dataset(), place, stop=lambda: next(asked))
    assert (caught.value.code, caught.value.step) == (128 + signal.SIGINT, 4)
    assert checkpoint.load(place.path).step == 4
    run(place.path, resume=True)
    assert toy.outcome(place.path) == toy.outcome(tmp_path / "whole")


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, resume=False, seed=seed)
    assert toy.outcome(tmp_path / "a") == toy.outcome(tmp_path / "b")
    assert toy.outcome(tmp_path / "a")[0] != toy.outcome(tmp_path / "c")[0]


def test_torn_and_superfluous_metrics_are_cut(tmp_path: Path) -> None:
    place, metrics = RunDir(tmp_path), tmp_path / "metrics.jsonl"
    place.cut_metrics(EMPTY)
    place.append_metrics('{"epoch": 1}\n')
    prefix = place.append_metrics('{"epoch": 2}\n')
    place.append_metrics('{"epoch": 3}\n{"epo')
    again = RunDir(tmp_path)
    again.cut_metrics(prefix)
    assert metrics.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'
    third = again.append_metrics('{"epoch": 3}\n')
    assert third == (metrics.stat().st_size, files.sha256_file(metrics))
    metrics.write_bytes(metrics.read_bytes()[:-1])
    with pytest.raises(
        TrainError, match=f"has {third.bytes - 1} bytes, its checkpoint was made at {third.bytes}"
    ):
        again.cut_metrics(third)
    metrics.write_text('{"epoch": 1}\n{"epoch": 7}\n')
    with pytest.raises(
        TrainError,
        match=r"metrics\.jsonl was changed after the checkpoint "
        r"was made",
    ):
        again.cut_metrics(prefix)
    assert metrics.read_text() == '{"epoch": 1}\n{"epoch": 7}\n'  # refused before anything is cut


def damaged_run(folder: Path) -> tuple[RunDir, Path]:
    run(folder, resume=False)
    (folder / "result.json").unlink()
    return RunDir(folder), next(folder.glob("checkpoint-*"))


@pytest.mark.parametrize("cut", [True, False], ids=["truncated", "one bit"])
def test_damaged_tensors_are_named_with_both_sums(tmp_path: Path, cut: bool) -> None:
    place, tensors = damaged_run(tmp_path)
    good = tensors.read_bytes()
    bad = good[:-100] if cut else good[:-100] + bytes([good[-100] ^ 1]) + good[-99:]
    tensors.write_bytes(bad)
    with pytest.raises(TrainError) as caught:
        run(place.path, resume=True)
    for part in (str(tensors), files.sha256_bytes(good), files.sha256_bytes(bad), "--overwrite"):
        assert part in str(caught.value)
    assert tensors.read_bytes() == bad  # nothing was lost by trying


def test_damaged_commit_is_named(tmp_path: Path) -> None:
    place, tensors = damaged_run(tmp_path)
    commit = tmp_path / "checkpoint.json"
    text = commit.read_text()
    for changed, message in (
        (text[:-20], "is damaged"),
        ("[]", "not an object"),
        ("{}", "'format' is missing"),
        (text.replace('"step": 12', '"step": 13'), r"is damaged: sha256 \w{64}, expected \w{64}"),
        (
            text.replace('"format": 2', '"format": 3'),
            "has format 3, this version of rewire reads 2",
        ),
        (text.replace(tensors.name, "../" + tensors.name), r"is damaged: sha256"),
    ):
        assert changed != text
        commit.write_text(changed)
        with pytest.raises(TrainError, match=message):
            run(place.path, resume=True)
    commit.write_text(text)
    tensors.unlink()
    with pytest.raises(TrainError, match=r"cannot read checkpoint .*No such file"):
        run(place.path, resume=True)


def test_checkpoint_of_other_options_is_refused(tmp_path: Path) -> None:
    place, _ = damaged_run(tmp_path)
    with pytest.raises(TrainError, match=r"config\.json was changed after the checkpoint"):
        run(place.path, resume=True, lr=0.1)


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    place = RunDir(tmp_path)
    other = RunDir(tmp_path)
    with (
        place.lock(),
        pytest.raises(TrainError, match="another process is training here"),
        other.lock(),
    ):
        pass
    with place.lock():
        pass


def test_nothing_is_pickled(tmp_path: Path) -> None:
    run(tmp_path, resume=False)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".jsonl", ".safetensors"}
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())

"""The registered sets: real files where there are some; made ones where a license is needed."""

from __future__ import annotations

import pickle
import sysconfig
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import real_data
from rewire.app import cli, data
from rewire.app.data import cifar10, speech, stdlib
from rewire.app.data.dataset import IGNORED
from rewire.app.errors import DataError


@pytest.mark.parametrize(
    ("name", "train", "test", "features", "classes"),
    [("isolet", 1092, 468, 617, 26), ("madelon", 2000, 600, 500, 2), ("leukemia", 50, 22, 7070, 2)],
)
def test_tables(name: str, train: int, test: int, features: int, classes: int) -> None:
    found = data.load(name, data_dir=real_data.folder("skfeature"))
    assert (len(found.train_y), len(found.test_y)) == (train, test)
    assert (found.features, len(found.classes)) == (features, classes)
    assert found.standardise


@pytest.mark.slow
def test_cifar_10() -> None:
    found = data.load("cifar-10", data_dir=real_data.folder("cifar-10"))
    assert found.train_y.bincount().tolist() == [5000] * 10
    assert found.test_y.bincount().tolist() == [1000] * 10
    pixels = found.train_x[:50000].view(-1, 3, 1024)
    means = pixels.mean((0, 2))
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4, rtol=0)


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def test_only_arrays_and_words_are_unpickled(capsys: pytest.CaptureFixture[str]) -> None:
    batch = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2]}
    found = cifar10.unpickle(pickle.dumps(batch, protocol=2))
    assert found["data"].tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(pickle.UnpicklingError, match="it asks for"):
        cifar10.unpickle(pickle.dumps({"data": _Evil()}, protocol=2))
    assert capsys.readouterr().out == ""


def test_features_of_speech() -> None:
    rate = 8000
    t = np.arange(rate // 2) / rate
    sound = (8000 * np.sin(2 * np.pi * 440 * t) * (t > 0.25)).astype(np.int16)
    found = speech.features(sound, rate)
    assert found.shape == (speech.steps_of(len(sound), rate), 39)
    energy = found[:, 0]
    assert energy[-5:].mean() > energy[:20].mean() + 5, "the tone is louder than silence"
    # derivatives are those of the numbers before them: a regression over two steps each side
    expected = sum(n * (found[10 + n, :13] - found[10 - n, :13]) for n in (1, 2)) / 10
    np.testing.assert_allclose(found[10, 13:26], expected, atol=1e-4)


def write_wave(path: Path, sound: np.ndarray, rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(sound.astype("<i2").tobytes())


def test_spoken_digits_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWIRE_DATA", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for digit in range(10):
        for speaker in ("anna", "theo"):
            for take in (0, 5):
                sound = generator.integers(-999, 999, 900 + 100 * digit)
                write_wave(tmp_path / "recordings" / f"{digit}_{speaker}_{take}.wav", sound, 8000)
    found = data.load("fsdd", data_dir=tmp_path)
    assert (len(found.train_y), len(found.test_y)) == (20, 20)
    assert found.shape == (speech.steps_of(1800, 8000), 39)
    last = found.train_x[0].view(found.shape)
    assert not last[speech.steps_of(900, 8000) :].any(), "what is short ends with zeros"
    again = data.load("fsdd", data_dir=tmp_path)  # from the cache
    assert torch.equal(again.train_x, found.train_x)
    other = data.load("fsdd-speaker", data_dir=tmp_path)
    assert len(other.test_y) == 20
    assert torch.equal(other.test_y.bincount(), torch.full((10,), 2))


def write_sphere(path: Path, sound: np.ndarray, rate: int) -> None:
    head = (
        f"NIST_1A\n   1024\nsample_count -i {len(sound)}\nsample_rate -i {rate}\n"
        "channel_count -i 1\nsample_byte_format -s2 01\nend_head\n"
    )
    path.write_bytes(head.encode().ljust(1024, b" ") + sound.astype("<i2").tobytes())


def test_timit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for part, speaker in (("TRAIN", "FCJF0"), ("TEST", "MDAB0"), ("TEST", "FAKS0")):
        folder = tmp_path / "TIMIT" / part / "DR1" / speaker
        folder.mkdir(parents=True)
        for number, name in enumerate(("SA1", "SX37", "SI648")):
            samples = 4800 + 1600 * number
            write_sphere(folder / f"{name}.WAV", generator.integers(-999, 999, samples), 16000)
            marks = f"0 1600 h#\n1600 3200 sh\n3200 {samples} iy\n"
            (folder / f"{name}.PHN").write_text(marks)
    found = data.load("timit", data_dir=tmp_path)
    assert (len(found.train_y), len(found.test_y)) == (2, 2), "no SA, the core speakers only"
    assert len(found.classes) == 61
    shorter = found.train_y[1]  # SX37: 6400 samples, 0.4 s
    steps = speech.steps_of(6400, 16000)
    assert (shorter[steps:] == IGNORED).all()
    words = [found.classes[i] for i in shorter[:steps]]
    assert words[0] == "h#"
    assert words[12] == "sh"
    assert words[-1] == "iy"
    with pytest.raises(DataError, match="licensed"):
        data.load("timit")


def test_the_standard_library_as_text() -> None:
    found = data.load("stdlib")
    assert found.tokens == len(found.classes) == found.outputs
    text = "".join(found.classes[i] for i in found.train_x[:200].flatten())
    first = min(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    assert text.startswith(first.read_text().expandtabs(4)[:1000])
    assert torch.equal(found.train_x[:, 1:], found.train_y[:, :-1])
    assert stdlib.encode("a\nü").tolist() == [66, 0, len(stdlib.CHARACTERS) - 1]


def test_data_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in data.available())

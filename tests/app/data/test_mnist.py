import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest

import real_data
from rewire.app import data
from rewire.app.data import mnist
from rewire.app.errors import DataError


@pytest.mark.parametrize(
    ("name", "mean"), [("mnist", 0.1307), ("fashion-mnist", 0.2860)], ids=["mnist", "fashion-mnist"]
)
def test_real_files(name: str, mean: float) -> None:
    folder = real_data.folder(name)
    loaded = data.load(name, data_dir=folder)
    assert loaded.train_x.shape == (60000, 784)
    assert loaded.test_x.shape == (10000, 784)
    assert loaded.image_shape == (28, 28)
    assert float(loaded.train_x.mean()) == pytest.approx(mean, abs=1e-4)
    assert float(loaded.train_x.max()) == 1
    if name == "mnist":
        assert loaded.train_y.bincount().tolist() == [
            5923,
            6742,
            5958,
            6131,
            5842,
            5421,
            5918,
            6265,
            5851,
            5949,
        ]


def test_folder_itself_is_accepted(tmp_path: Path) -> None:
    folder = real_data.folder("mnist")
    for file in mnist.MNIST.files.values():
        (tmp_path / file.name).symlink_to(folder / "mnist" / file.name)
    assert data.load("mnist", data_dir=tmp_path).features == 784


def test_newly_compressed_copy_is_accepted(tmp_path: Path) -> None:
    source = real_data.folder("mnist") / "mnist"
    file = mnist.MNIST.files["test_y"]
    copy = tmp_path / file.name
    copy.write_bytes(gzip.compress(gzip.decompress((source / file.name).read_bytes()), 1))
    assert np.array_equal(mnist.read(copy, file), mnist.read(source / file.name, file))


def test_damage_names_file_and_both_sums(tmp_path: Path) -> None:
    source = real_data.folder("mnist") / "mnist"
    file = mnist.MNIST.files["test_y"]
    good = (source / file.name).read_bytes()
    copy = tmp_path / file.name
    changed_label = bytearray(gzip.decompress(good))
    changed_label[100] ^= 1
    for content, reason in (
        (good[:2000], "cut short"),
        (good[:2000] + bytes([good[2000] ^ 255]) + good[2001:], "damaged"),
        (gzip.compress(bytes(changed_label)), "not the official file"),
        (gzip.compress(bytes(changed_label)[:-1]), "needs 10000 values"),
        (b"", "too few"),
    ):
        copy.write_bytes(content)
        with pytest.raises(DataError) as caught:
            mnist.read(copy, file)
        message = str(caught.value)
        assert reason in message
        assert str(copy) in message
        assert f"expected {file.sha256}" in message
        assert f"sha256 {mnist.sha256_bytes(content)}" in message
        assert "\n" not in message


def test_missing_files_are_listed(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"train-images-idx3-ubyte\.gz, train-labels.* "
        r"subfolder named mnist",
    ):
        data.load("mnist", data_dir=tmp_path)
    with pytest.raises(DataError, match="not found"):
        data.load("mnist", data_dir=tmp_path / "nowhere")


def test_fashion_is_not_taken_for_mnist(tmp_path: Path) -> None:
    shutil.copytree(real_data.folder("fashion-mnist") / "fashion-mnist", tmp_path / "mnist")
    with pytest.raises(DataError, match="not the official file"):
        data.load("mnist", data_dir=tmp_path)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWIRE_DATA", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert mnist.cache_folder() == Path("/a")
    monkeypatch.delenv("REWIRE_DATA")
    assert mnist.cache_folder() == Path("/b/rewire")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert mnist.cache_folder() == Path.home() / ".cache" / "rewire"

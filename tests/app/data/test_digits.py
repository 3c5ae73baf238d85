import numpy as np
import pytest
import torch

from rewire.app import data
from rewire.app.data import digits
from rewire.app.errors import DataError


def test_equals_what_scikit_learn_ships() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    pixels, labels = digits.read()
    assert np.array_equal(pixels, theirs.data)
    assert np.array_equal(labels, theirs.target)


def test_split_is_fixed_and_stratified() -> None:
    loaded = data.load("digits")
    assert loaded.train_x.shape == (1442, 64)
    assert loaded.test_x.shape == (355, 64)
    _, labels = digits.read()
    chosen = digits.is_test(labels)
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        assert np.array_equal(np.flatnonzero(chosen & (labels == digit)), rows[4::5])
        assert (loaded.test_y == digit).sum() == len(rows) // 5
    assert np.array_equal(loaded.test_y.numpy(), labels[chosen])


def test_shape_and_range() -> None:
    loaded = data.load("digits")
    assert loaded.train_x.dtype == torch.float32
    assert loaded.train_y.dtype == torch.int64
    assert 0 == loaded.train_x.min() < loaded.train_x.max() == 1
    assert loaded.features == 64 == np.prod(loaded.image_shape)
    assert len(loaded.classes) == 10


def test_damaged_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SHA256", "0" * 64)
    with pytest.raises(
        DataError,
        match=r"digits\.csv\.gz .* is damaged: sha256 "
        r"09f66e.*expected 0000",
    ):
        data.load("digits")


def test_unknown_name() -> None:
    with pytest.raises(
        DataError,
        match=r"unknown name 'cifar' \(did you mean 'cifar-10'\?\); allowed are digits, mnist",
    ):
        data.load("cifar")


def test_dataset_refuses_what_does_not_fit() -> None:
    x, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)

    def make(**changes: torch.Tensor) -> data.Dataset:
        parts = {"train_x": x, "train_y": y, "test_x": x, "test_y": y} | changes
        return data.Dataset(name="toy", classes=("a",), **parts)

    make()
    for changes, message in (
        ({"train_y": y[:3]}, "shape"),
        ({"train_x": x[:0], "train_y": y[:0]}, "samples > 0"),
        ({"test_x": x.double()}, "float32"),
        ({"test_y": y + 1}, "labels go from 1 to 1; allowed is 0 to 0"),
        ({"test_x": torch.zeros(4, 2)}, "different numbers of features"),
    ):
        with pytest.raises(DataError, match=message):
            make(**changes)

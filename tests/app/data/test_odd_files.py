"""Files and functions that hold what nobody should give: each is refused in one sentence."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from scipy import sparse

from rewire.app import data
from rewire.app.data import FileOptions
from rewire.app.data.own import from_function
from rewire.app.data.tables import MOST_WORDS
from rewire.app.errors import DataError

X = np.random.default_rng(0).normal(size=(30, 4))
Y = np.arange(30) % 2


def load(path: Path, **options: Any) -> data.Dataset:
    return data.load(str(path), options=FileOptions(**options))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X, "y": np.array(3)}, r"30 samples and targets of shape \(\)"),
        ({"x": X[:, :0], "y": Y}, "no column besides the target"),
        ({"x": X, "y": np.zeros((30, 2, 2))}, "targets of shape"),
        ({"x": X, "y": np.array([{}] * 30, dtype=object)}, "allow_pickle=False"),
        (
            {"format": np.array(["csr", "csc"]), **dict.fromkeys(("indptr", "indices", "data"), Y)}
            | {"shape": np.array([1, 2]), "y": Y},
            "a sparse matrix in several formats",
        ),
    ],
)
def test_npz(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "odd.npz")


def test_an_array_that_claims_to_be_huge(tmp_path: Path) -> None:
    head = io.BytesIO()
    claimed = {"descr": "<f4", "fortran_order": False, "shape": (10**14, 10)}
    np.lib.format.write_array_header_1_0(head, claimed)
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as file:
        file.writestr("x.npy", head.getvalue())
    with pytest.raises(DataError, match="larger than the memory"):
        load(tmp_path / "odd.npz")


def test_a_damaged_archive(tmp_path: Path) -> None:
    path = tmp_path / "odd.npz"
    np.savez_compressed(path, x=X, y=Y)
    content = bytearray(path.read_bytes())
    content[70:140] = np.random.default_rng(0).integers(0, 256, 70, dtype=np.uint8).tobytes()
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot read"):
        load(path)


def test_options_that_a_divided_file_does_not_need_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "parts.npz", x_train=X, y_train=Y, x_test=X, y_test=Y)
    with pytest.raises(DataError, match=r"--test-share: .* has no use for it"):
        load(tmp_path / "parts.npz", test_share=0.5)


def test_numbers_and_words_as_classes(tmp_path: Path) -> None:
    for part, words in (("train", "12"), ("test", "ab")):  # pandas reads numbers, and words
        rows = "\n".join(f"{i},{words[i % 2]}" for i in range(20))
        (tmp_path / f"{part}.csv").write_text(f"a,y\n{rows}\n")
    with pytest.raises(DataError, match="class 'a' and 1 more is missing in the training part"):
        load(tmp_path / "train.csv", test_data=str(tmp_path / "test.csv"))
    mixed = np.array([1, "a"] * 15, dtype=object)
    assert from_function("m:f", (X, mixed), FileOptions()).classes == ("1", "a")


def test_a_column_of_names_is_no_input(tmp_path: Path) -> None:
    """One input for each of 10,000 names would take 400 MB, of 100,000 names 40 GB."""
    frame = pandas.DataFrame({"who": [f"n{i}" for i in range(MOST_WORDS + 1)], "a": 1.0})
    frame["y"] = np.arange(len(frame)) % 2
    frame.to_csv(tmp_path / "names.csv", index=False)
    with pytest.raises(DataError, match=f"'who' has {MOST_WORDS + 1} different words"):
        load(tmp_path / "names.csv", test_data=str(tmp_path / "names.csv"))


def test_rows_with_more_fields_than_names(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,target\n" + "".join(f"{i},{i},{i % 2},7\n" for i in range(40)))
    with pytest.raises(DataError, match="its rows have more fields than its first line has names"):
        load(path)
    path.write_text("a,b,target\n" + "".join(f"{i},{i},{i % 2},\n" for i in range(40)))
    found = load(path)  # a separator at the end of each line hides nothing
    assert (found.shape, found.classes) == ((2,), ("0", "1"))


@pytest.mark.parametrize("names", ["a;b;target\n", ""])
def test_decimal_commas(names: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = "".join(f"{i},5;{i * 2},25;{i % 2}\n" for i in range(40))
    path.write_text(names + rows)
    found = load(path, target="target" if names else "2")
    assert found.shape == (2,)
    assert found.classes == ("0", "1")


def test_pictures_of_16_bits_are_not_cut_off_at_255(tmp_path: Path) -> None:
    for word in ("cat", "dog"):
        (tmp_path / "photos" / word).mkdir(parents=True)
        pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
        Image.fromarray(pixels).save(tmp_path / "photos" / word / "1.png")
    with pytest.raises(DataError, match=r"1.png: its pixels are of mode I;16, needed are 8 bits"):
        load(tmp_path / "photos")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((pandas.DataFrame(X), Y[:20]), r"shape \(30, 4\) and targets of shape \(20,\)"),
        ((sparse.csr_array(X), Y[:20]), r"shape \(30, 4\) and targets of shape \(20,\)"),
        ((X, np.array(1)), r"targets of shape \(\)"),
        ((X + 1j, Y), "complex128, needed are numbers"),
        ((np.full((30, 4), "a"), Y), "<U1, needed are numbers"),
        ((pandas.DataFrame(X, columns=list("aabc")), Y), "two columns called 'a'"),
        (
            {"train": (X, Y), "test": (pandas.DataFrame(X), Y)},
            "one is a DataFrame and one an array",
        ),
    ],
)
def test_functions(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_function("m:f", given, FileOptions())


def test_tensors_that_numpy_does_not_know() -> None:
    x = torch.rand(30, 4, requires_grad=True).bfloat16()
    found = from_function("m:f", (x, torch.arange(30) % 2), FileOptions())
    rows = torch.cat([found.train_x, found.test_x])
    assert sorted(rows.flatten().tolist()) == sorted(x.flatten().tolist())

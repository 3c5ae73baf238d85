"""Files of one's own: what they hold arrives unchanged, and what is wrong with them is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from scipy import io, sparse
from sklearn import datasets
from sklearn.preprocessing import StandardScaler

import toy
from rewire.app import cli, data
from rewire.app.data import Dataset, FileOptions
from rewire.app.data.rows import ByteRows, SparseRows
from rewire.app.data.splitting import stratified
from rewire.app.errors import DataError
from rewire.app.train import loop
from rewire.app.train.config import make_config
from rewire.app.train.prepared import prepare
from rewire.app.train.run_dir import RunDir


def iris() -> Any:
    return datasets.load_iris(as_frame=True).frame


WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "parquet": lambda frame, path: frame.to_parquet(path),
    "npz": lambda frame, path: np.savez(
        path, x=frame.drop(columns="target").to_numpy(), y=frame["target"].to_numpy()
    ),
    "mat": lambda frame, path: io.savemat(
        path, {"X": frame.drop(columns="target").to_numpy(), "Y": frame[["target"]].to_numpy()}
    ),
}


def load(path: Path | str, **options: Any) -> Dataset:
    return data.load(str(path), options=FileOptions(**options))


@pytest.mark.parametrize("ending", WRITERS)
def test_every_kind_of_file_gives_the_same_samples(tmp_path: Path, ending: str) -> None:
    frame, path = iris(), tmp_path / f"iris.{ending}"
    WRITERS[ending](frame, path)
    found = load(path)
    assert found.classes == ("0", "1", "2")
    assert (len(found.train_y), len(found.test_y)) == (120, 30)
    assert found.test_y.bincount().tolist() == [10, 10, 10]
    rows = torch.cat([found.train_x, found.test_x]), torch.cat([found.train_y, found.test_y])
    mine = sorted([*map(float, x), int(y)] for x, y in zip(*rows, strict=True))
    wanted = sorted(frame.astype(np.float32).to_numpy().tolist())
    assert np.allclose(mine, wanted)
    assert list(found.sha256) == [path.name]
    again, other = load(path), load(path, split_seed=1)
    assert torch.equal(again.test_x, found.test_x)
    assert not torch.equal(other.test_x, found.test_x)


def test_files_for_other_parts_and_words_as_columns(tmp_path: Path) -> None:
    train = pandas.DataFrame(
        {"a": [1, 2, 3, 4], "colour": ["red", "blue", "red", "blue"], "kind": list("xyxy")}
    )
    test = pandas.DataFrame({"kind": ["y", "x"], "colour": ["green", "red"], "a": [5, 6]})
    for name, frame in (("train", train), ("test", test), ("valid", test)):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    found = load(
        tmp_path / "train.csv",
        target="kind",
        test_data=str(tmp_path / "test.csv"),
        validation_data=str(tmp_path / "valid.csv"),
    )
    assert found.feature_names == ("a", "colour=blue", "colour=red")
    assert found.train_x.tolist() == [[1, 0, 1], [2, 1, 0], [3, 0, 1], [4, 1, 0]]
    assert found.test_x.tolist() == [[5, 0, 0], [6, 0, 1]], "no input for an unknown word"
    assert found.test_y.tolist() == [1, 0]
    assert found.validation_y is not None
    assert found.validation_y.tolist() == [1, 0]


def broken(**columns: Any) -> Any:
    return iris().assign(**columns)


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (iris(), {"target": "targt"}, r"no column 'targt' \(did you mean 'target'\?\)"),
        (iris().drop(columns="target"), {}, "give the column .* --target 'petal width"),
        (broken(target=1), {}, "'target' has one class only, '1'"),
        (broken(extra=[np.nan, 1.0] * 75), {}, r"missing \(NaN\) in 'extra' \(75\)"),
        (broken(extra=["a", None] * 75), {}, r"missing \(NaN\) in 'extra' \(75\)"),
        (broken(extra=[np.inf, 1.0] * 75), {}, r"not finite in 'extra'"),
        (broken(target=[None, "b", "c"] * 50), {}, "the target 'target' is missing in 50 of 150"),
        (
            broken(target=[7] + [0, 1] * 74 + [0]),
            {},
            "class '7' is missing in the test part: it has 1 of 150 samples",
        ),
        (iris(), {"test_share": 0.001}, "--test-share 0.001 of 150 samples leaves no sample"),
        (broken(target=list("abc") * 50), {"task": "regression"}, "needs numbers"),
        (broken(when=pandas.Timestamp("2020-01-01")), {}, "'when' has times"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, frame: Any, options: dict[str, Any], message: str
) -> None:
    frame.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "x.parquet", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["csv", "parquet", "npz", "mat", "xyz"])
@pytest.mark.parametrize("content", [b"", b"abc", b"\x00\xff" * 300, None])
def test_damaged_files(tmp_path: Path, ending: str, content: bytes | None) -> None:
    path = tmp_path / f"x.{ending}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read|--target") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_objects_in_an_npz_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.array([{}, {}], dtype=object), y=np.arange(2))
    with pytest.raises(DataError, match="cannot read"):
        load(tmp_path / "x.npz")


def test_sparse_matrices_stay_sparse(tmp_path: Path) -> None:
    matrix = sparse.random(60, 400, 0.05, "csr", random_state=0, dtype=np.float32)
    y = np.arange(60) % 3
    named = {n: getattr(matrix, n) for n in ("data", "indices", "indptr")}
    np.savez(
        tmp_path / "x.npz", format=np.array(b"csr"), shape=np.array(matrix.shape), y=y, **named
    )
    found = load(tmp_path / "x.npz")
    assert isinstance(found.train_x, SparseRows)
    made = prepare(make_config({"validation": 0.2}), found)
    x = made.train[0].rows
    assert isinstance(x, SparseRows)
    assert x.matrix.nnz <= matrix.nnz
    # as scikit-learn scales without centring, on the training part alone
    split = prepare(make_config({"validation": 0.2, "standardise": False}), found)
    ours, theirs = split.train[0].rows, split.test[0].rows
    scaler = StandardScaler(with_mean=False).fit(ours.matrix)
    np.testing.assert_allclose(
        made.test[0][:5], scaler.transform(theirs.matrix)[:5].toarray(), rtol=1e-5
    )
    config = make_config({"hidden": [10], "epochs": 2, "method": "set", "threads": 1})
    result = loop.run(config, found, RunDir(tmp_path / "run"))
    assert result["test_accuracy"] <= 1


def test_standardised_by_the_training_part_alone(tmp_path: Path) -> None:
    iris().to_csv(tmp_path / "iris.csv", index=False)
    found = load(tmp_path / "iris.csv")
    config = make_config({"validation": 0.25, "seed": 3})
    raw = prepare(config.model_copy(update={"standardise": False}), found)
    made = prepare(config, found)
    scaler = StandardScaler().fit(raw.train[0])
    for part in ("train", "validation", "test"):
        expected = scaler.transform(getattr(raw, part)[0])
        np.testing.assert_allclose(getattr(made, part)[0], expected, atol=1e-5)
    assert made.validation[1].bincount().tolist() == [10, 10, 10]


def test_regression_ends_with_r2(tmp_path: Path, capsys: Any) -> None:
    frame = datasets.load_diabetes(as_frame=True).frame
    frame.to_csv(tmp_path / "diabetes.csv", index=False)
    folder = tmp_path / "run"
    command = ["train", "--data", str(tmp_path / "diabetes.csv"), "--density", "0.3"]
    command += ["--method", "set", "--hidden", "20", "--epochs", "15", "--run-dir", str(folder)]
    assert cli.run(command) == 0
    out = capsys.readouterr().out
    assert "test R²" in out
    _, metrics, result = toy.outcome(folder)
    assert 0.2 < result["test_r2"] < 1
    assert "test_accuracy" not in result
    assert all("train_r2" in line and "train_accuracy" not in line for line in metrics)
    assert (folder / "inputs.safetensors").exists()
    assert "R²" in (folder / "report.html").read_text()
    assert str(tmp_path) not in (folder / "report.html").read_text(), "paths are private"


def test_bad_data_lose_nothing(tmp_path: Path, capsys: Any) -> None:
    iris().to_csv(tmp_path / "iris.csv", index=False)
    folder = tmp_path / "run"
    command = ["train", "--data", str(tmp_path / "iris.csv"), "--hidden", "5", "--epochs", "1"]
    command += ["--run-dir", str(folder), "--quiet"]
    assert cli.run(command) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for change in (["--target", "tragte"], ["--test-share", "0.001"], ["--standardise=1"]):
        assert cli.run([*command, *change, "--overwrite"]) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "result.json").unlink()
    frame = iris()
    frame.iloc[0, 0] += 1
    frame.to_csv(tmp_path / "iris.csv", index=False)
    capsys.readouterr()
    assert cli.run(["train", "--resume", "--run-dir", str(folder)]) == 2
    assert "the data are not those that the run" in capsys.readouterr().err


def test_folder_of_images(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(20):
        folder = tmp_path / "photos" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    found = load(tmp_path / "photos")
    assert found.classes == ("cat", "dog")
    assert found.shape == (3, 6, 9)
    assert len(found.test_y) == 4
    assert load(tmp_path / "photos", image_size=8).shape == (3, 8, 8)
    Image.fromarray(pixels[:5]).save(folder / "odd.png")
    with pytest.raises(DataError, match="give --image-size"):
        load(tmp_path / "photos")


def test_scikit_learn() -> None:
    found = data.load("sklearn:breast_cancer")
    assert found.classes == ("benign", "malignant")
    assert found.features == 30
    with pytest.raises(DataError, match=r"did you mean 'iris'"):
        data.load("sklearn:irsi")


def pair() -> Any:
    return torch.rand(20, 4), torch.arange(20) % 2


def sets() -> Any:
    whole = torch.utils.data.TensorDataset(torch.rand(20, 3, 4, 4), torch.arange(20) % 2)
    return {"train": whole, "test": whole}


def numbers() -> Any:
    return np.random.default_rng(0).random((20, 4)), np.linspace(0, 1, 20)


def nothing() -> Any:
    return 3


def test_functions_of_ones_own() -> None:
    assert data.load(f"{__name__}:pair").shape == (4,)
    assert data.load(f"{__name__}:sets").shape == (3, 4, 4)
    assert len(data.load(f"{__name__}:sets").test_y) == 20
    assert data.load(f"{__name__}:numbers").goal == "regression"
    with pytest.raises(DataError, match="returned a int"):
        data.load(f"{__name__}:nothing")


def test_stratified_is_exact_and_fair() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 50 + [1] * 9 + [2] * 2)
    for count in range(1, 60):
        keep, out = stratified(y, count, generator)
        assert sorted(keep.tolist() + out.tolist()) == list(range(61))
        assert len(out) == count
        if 3 <= count <= 58:
            for part in (keep, out):
                assert y[part].unique().tolist() == [0, 1, 2]
        share = y[out].bincount(minlength=3) / count
        if count >= 10:
            assert abs(float(share[0]) - 50 / 61) < 0.15


def test_bytes_are_scaled_as_floats_are() -> None:
    values = torch.randint(0, 256, (9, 12), dtype=torch.uint8)
    rows = ByteRows(values, torch.tensor(0.0), torch.tensor(1 / 255))
    y = torch.arange(9) % 3
    whole = values.float() / 255
    made = []
    for x in (rows, whole):
        found = Dataset("x", x, y, x, y, ("a", "b", "c"), (3, 2, 2), standardise=True)
        part = prepare(make_config({"validation": 0, "model": "resnet18"}), found).train[0]
        made.append(part[:])
    torch.testing.assert_close(*made)
    channels = made[0]
    torch.testing.assert_close(channels.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(channels.std((0, 2, 3), correction=0), torch.ones(3))

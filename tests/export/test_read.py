"""Weights of other programs: masks of torch's pruning, pairs, dense networks, and damaged files."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import rewire
from rewire.storage.reading import FileError


def perceptron() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))


def saved(state: dict[str, Any], folder: Path, ending: str) -> Path:
    path = folder / f"weights{ending}"
    if ending == ".safetensors":
        safetensors.torch.save_file({k: t.contiguous() for k, t in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_pruned_network_keeps_its_masks(ending: str, tmp_path: Path) -> None:
    model = perceptron()
    prune.l1_unstructured(model[0], "weight", amount=0.7)
    prune.random_unstructured(model[2], "weight", amount=0.5)
    prune.l1_unstructured(model[2], "bias", amount=2)
    with torch.no_grad():  # a connection of value 0 stays a connection
        model[0].weight_orig[model[0].weight_mask.bool()] *= torch.arange(32) != 3
    x = torch.randn(5, 12)
    expected = model(x)
    path = saved(dict(model.state_dict()), tmp_path, ending)
    again = rewire.load(perceptron(), path)
    counts = {name: w.connections for name, w in rewire.sparse_weights(again)}
    assert counts == {"0.weight": 32, "2.weight": 18}
    torch.testing.assert_close(again(x), expected)


def test_a_checkpoint_with_the_state_inside(tmp_path: Path) -> None:
    model = perceptron()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "a.pth")
    assert "0.weight.values" in rewire.export.read(tmp_path / "a.pth")


def test_masks_beside_the_weights_or_in_a_file_of_their_own(tmp_path: Path) -> None:
    model = perceptron()
    mask = torch.rand(9, 12) < 0.3
    wanted = model[0].weight.detach() * mask
    beside = {**model.state_dict(), "0.weight_mask": mask}
    own = saved(beside, tmp_path, ".safetensors")
    state = rewire.export.read(own)
    dense = torch.zeros(9, 12)
    dense[state["0.weight.rows"].long(), state["0.weight.cols"].long()] = state["0.weight.values"]
    assert torch.equal(dense, wanted)
    plain = saved(dict(model.state_dict()), tmp_path, ".pt")
    masks = tmp_path / "masks.safetensors"
    safetensors.torch.save_file({"0.weight": mask}, masks)
    for given in (masks, {"0.weight": mask}):
        found = rewire.export.read(plain, masks=given)
        assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ({"density": 0.25}, {"0.weight": 22, "2.weight": 14}),
        ({"density": 0.25, "distribution": "uniform"}, {"0.weight": 27, "2.weight": 9}),
        ({"connections": 40, "only": "0.*"}, {"0.weight": 40}),
        ({"density": {"2.*": 0.5}}, {"2.weight": 18}),
    ],
)
def test_dense_weights_keep_the_largest(
    given: dict[str, Any], counts: dict[str, int], tmp_path: Path
) -> None:
    model = perceptron()
    path = saved(dict(model.state_dict()), tmp_path, ".safetensors")
    again = rewire.load(perceptron(), path, **given)
    found = dict(rewire.sparse_weights(again))
    assert {name: w.connections for name, w in found.items()} == counts
    for name, weight in found.items():
        dense = model.get_parameter(name).detach().flatten()
        bar = dense.abs().sort(descending=True).values[counts[name] - 1]
        expected = torch.where(dense.abs() >= bar, dense, torch.zeros_like(dense))
        assert torch.equal(weight.to_dense().flatten(), expected)


def test_a_threshold(tmp_path: Path) -> None:
    model = perceptron()
    path = saved(dict(model.state_dict()), tmp_path, ".safetensors")
    again: Any = rewire.load(perceptron(), path, threshold=0.2)
    dense = model[0].weight.detach()
    assert torch.equal(again[0].weight.to_dense(), dense * (dense.abs() > 0.2))


def test_stacked_projections_of_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    prune.l1_unstructured(layer, "in_proj_weight", amount=0.6)
    mask = layer.in_proj_weight_mask
    path = saved(dict(layer.state_dict()), tmp_path, ".safetensors")
    state = rewire.export.read(path, density={"out_proj.weight": 0.5})
    again: Any = rewire.load(nn.MultiheadAttention(8, 2, batch_first=True), state)
    assert isinstance(again, rewire.nn.SparseMultiheadAttention)
    for part, own in zip(mask.chunk(3), ("q", "k", "v"), strict=True):
        assert getattr(again, f"{own}_proj_weight").connections == int(part.sum())


def test_it_goes_on_training(tmp_path: Path) -> None:
    model = perceptron()
    path = saved(dict(model.state_dict()), tmp_path, ".safetensors")
    again = rewire.load(perceptron(), path, density=0.3)
    optimizer = torch.optim.Adam(again.parameters())
    method = rewire.methods.SET(again, optimizer, every=1)
    for _ in range(3):
        again(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
        method.step()
    assert sum(w.connections for _, w in rewire.sparse_weights(again)) == round(0.3 * 144)


# --- refusals -------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_no_code_of_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"0.weight": torch.ones(3, 3), "x": Evil()}, "evil.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Evil()))
    np.savez("evil.npz", **{"w.data": np.array([Evil()], dtype=object), "w.row": np.zeros(1)})
    for name in ("evil.pt", "plain.pt", "evil.npz"):
        with pytest.raises(FileError):
            rewire.export.read(name)
    assert not Path("ran").exists()


def _arrays(**changed: Any) -> dict[str, Any]:
    whole = {
        "w.data": np.ones(3, np.float32), "w.indices": np.array([0, 2, 1]),
        "w.indptr": np.array([0, 2, 3]), "w.shape": np.array([2, 3]),
    }  # fmt: skip
    return {k: v for k, v in (whole | changed).items() if v is not None}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"w.indices": np.array([0, 3, 1])}, "outside"),
        ({"w.indices": np.array([0, 0, 1])}, "more than once"),
        ({"w.indices": np.array([0, -1, 1])}, "outside|-1"),
        ({"w.indptr": np.array([0, 2, 4])}, "does not lead through"),
        ({"w.indptr": np.array([0, 3])}, "does not fit the shape"),
        ({"w.indptr": np.array([0, 3, 2, 3])}, "does not lead through"),
        ({"w.indices": np.array([0.0, 2.0, 1.0])}, "lists of integers"),
        ({"w.data": np.ones(2, np.float32)}, "as many floats"),
        ({"w.data": np.ones(3, np.int64)}, "as many floats"),
        ({"w.shape": np.array([2])}, "dimensions"),
        ({"w.shape": np.array([-2, 3])}, "-2"),
        ({"w.shape": None}, "no w.shape"),
        ({"b": np.array(["word"])}, "allowed are numbers"),
    ],
)
def test_damaged_lists_are_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **_arrays(**changed))
    with pytest.raises(FileError, match=said):
        rewire.export.read(tmp_path / "a.npz")


def test_a_shape_beyond_memory_costs_nothing(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz",
        **{"w.data": np.ones(2), "w.row": [7, 10**17], "w.col": [3, 1], "w.shape": [10**17 + 1, 9]},
    )
    state = rewire.export.read(tmp_path / "a.npz")
    assert state["w.rows"].tolist() == [7, 10**17]
    np.savez(
        tmp_path / "b.npz",
        **{"w.data": np.ones(1), "w.row": [7], "w.col": [3], "w.shape": [2**40, 2**40]},
    )
    with pytest.raises(FileError, match="no weight has the shape"):
        rewire.export.read(tmp_path / "b.npz")


def test_members_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **_arrays())
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("note.npy", b"no array")
    with pytest.raises(FileError, match=r"note|no npz file"):
        rewire.export.read(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("w.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'shape': (" + b" " * 90)
    with pytest.raises(FileError, match="no npz file"):
        rewire.export.read(tmp_path / "b.npz")


def test_files_cut_short_or_changed_raise_one_error(tmp_path: Path) -> None:
    model = rewire.sparsify(perceptron(), density=0.3)
    generator = np.random.default_rng(0)
    for name, file in (("csr", "a.npz"), ("parquet", "a.parquet"), ("csv", "a.csv")):
        path = tmp_path / file
        rewire.export.save(model, path, name)
        content = path.read_bytes()
        for _ in range(40):
            bad = bytearray(content[: generator.integers(1, len(content) + 1)])
            for place in generator.integers(0, len(bad), 3):
                bad[place] = generator.integers(256)
            path.write_bytes(bad)
            with contextlib.suppress(ValueError, RuntimeError):
                rewire.load(perceptron(), path, strict=False)


BAD_CSV = {
    "weight,source,target\n": "no column value",
    "weight,source,target,value\n0.weight,1,2\n": "line 2",
    "weight,source,target,value\n0.weight,1,x,0.5\n": "line 2",
    "weight,source,target,value\n0.weight,1,99,0.5\n": "outside",
    "weight,source,target,value\n0.weight,1,2,0.5\n0.weight,1,2,0.5\n": "more than once",
    "weight,source,target,value\nother,1,2,0.5\n": "shape of 'other'",
}


@pytest.mark.parametrize("text", BAD_CSV)
def test_bad_edges_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=BAD_CSV[text]):
        rewire.load(perceptron(), path, strict=False)


def _dense(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing to keep": (rewire.export.read, "has no sparse weight and no mask"),
    "two budgets": (lambda p: rewire.export.read(p, density=0.1, threshold=1), "density and"),
    "patterns alone": (lambda p: rewire.export.read(p, only="0.*"), "only= and exclude= are for"),
    "no such weight": (lambda p: rewire.export.read(p, density=0.1, only="9.*"), "no dense weight"),
    "a mask too many": (lambda p: rewire.export.read(p, masks={"7": torch.ones(1)}), "no tensor"),
    "another shape": (
        lambda p: rewire.export.read(p, masks={"0.weight": torch.ones(9, 11)}), "one number for"
    ),
    "negative": (lambda p: rewire.export.read(p, threshold=-1.0), "at least 0"),
    "shapes": (lambda p: rewire.export.read(p, shapes={"a": (1, 1)}), "lists of edges"),
    "another network": (
        lambda p: rewire.load(nn.Sequential(nn.Linear(3, 9)), p, density=0.5), "has the shape"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what: str, tmp_path: Path) -> None:
    path = saved(_dense(perceptron()), tmp_path, ".safetensors")
    call, said = REFUSED[what]
    with pytest.raises(ValueError, match=said):
        call(path)

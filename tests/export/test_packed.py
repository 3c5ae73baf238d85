"""Packed ternary weights: exact round trips, the bytes that were promised, and files that must be
refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rewire.export import load_ternary, pack_ternary, save_ternary
from rewire.export.ternary import _deltas, _encode, _to_bits
from rewire.methods import Ternary
from rewire.nn import SparseLinear, SparseWeight, sparse_weights
from rewire.storage import files
from rewire.storage import tensors as tensor_file


def ternary(
    shape: tuple[int, ...], connections: int, scale: float = 0.3, dtype: Any = torch.float32
) -> SparseWeight:
    generator = torch.Generator().manual_seed(connections)
    weight = SparseWeight(shape, connections, generator=generator, dtype=dtype)
    with torch.no_grad():
        weight.values.copy_(
            scale * (1 - 2 * torch.randint(0, 2, (connections,), generator=generator))
        )
    return weight


class Net(nn.Module):
    def __init__(self, *weights: SparseWeight) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            SparseLinear.from_weight(w, torch.arange(float(w.shape[0]))) for w in weights
        )
        self.norm = nn.BatchNorm1d(3)


def test_a_trained_model_comes_back_bit_by_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def dense() -> nn.Sequential:
        return nn.Sequential(
            nn.Unflatten(1, (1, 20)),
            nn.Conv1d(1, 4, 3),
            nn.Flatten(),
            nn.Linear(72, 30),
            nn.GRU(30, 8),
        )

    model = dense()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(9, 20)
    method = Ternary(model, optimizer, threshold=0.6, after_epochs=1)
    model(x)[0].square().sum().backward()
    optimizer.step()
    method.step()
    method.end_epoch()
    method.finalize()
    result = save_ternary(model, tmp_path / "model.safetensors")
    assert result.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    other = dense()
    again = Ternary(other, torch.optim.SGD(other.parameters(), lr=0.1), threshold=0.2)
    other = again.finalize()
    other.load_state_dict(load_ternary(tmp_path / "model.safetensors"))
    for (name, a), (_, b) in zip(sparse_weights(model), sparse_weights(other), strict=True):
        assert torch.equal(a.to_dense(), b.to_dense()), name
    assert torch.equal(model(x)[0], other(x)[0])


@pytest.mark.parametrize("code", ["auto", "delta", "position"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trips_of_awkward_weights(code: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    one = SparseWeight.from_coo(
        (1, 5), *torch.tensor([[0], [4]]), torch.tensor([-2.0], dtype=dtype)
    )
    empty = SparseWeight.from_coo(
        (4, 4), *torch.empty(2, 0, dtype=torch.int64), torch.empty(0, dtype=dtype), capacity=1
    )
    gaps = ternary((6, 7), 9, dtype=dtype)
    gaps.rewire(torch.tensor([2, 5]), torch.tensor([-1, -1]), torch.tensor([-1, -1]))
    model = Net(
        one, empty, gaps, ternary((5, 6), 30, dtype=dtype), ternary((40, 1000), 13, dtype=dtype)
    )
    result = save_ternary(model, tmp_path / "x", code=code)
    assert [w.connections for w in result.weights] == [1, 0, 7, 30, 13]
    fresh = Net(*(ternary(tuple(w.shape), 1, dtype=dtype) for _, w in sparse_weights(model)))
    fresh.load_state_dict(load_ternary(tmp_path / "x"))
    for (_, a), (_, b) in zip(sparse_weights(model), sparse_weights(fresh), strict=True):
        assert torch.equal(a.to_dense(), b.to_dense())
        assert b.connections == a.connections
    assert torch.equal(fresh.layers[2].bias, model.layers[2].bias)  # type: ignore[arg-type]


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_codes_are_what_the_module_says(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 3000))
    positions = sorted(data.draw(st.sets(st.integers(0, size - 1), max_size=60)))
    code, bits, fields = _encode(np.array(positions, dtype=np.int64), size, "delta")
    assert code == "delta"
    here, found = 0, []
    for field in fields.tolist():  # read as the module describes it
        assert 0 <= field < 2**bits
        here += field
        if field < 2**bits - 1:
            found.append(here)
            here += 1
    assert found == positions
    width = max((size - 1).bit_length(), 1)
    gaps = np.diff(np.array(positions, dtype=np.int64), prepend=-1) - 1
    assert len(fields) * bits == min(b * len(_deltas(gaps, 2**b - 1)) for b in range(1, width + 1))
    auto = _encode(np.array(positions, dtype=np.int64), size, "auto")
    assert len(auto[2]) * auto[1] == min(len(fields) * bits, width * len(positions))
    packed = _to_bits(fields, bits)
    number = int.from_bytes(packed.numpy().tobytes(), "little")
    assert [(number >> (bits * i)) & (2**bits - 1) for i in range(len(fields))] == fields.tolist()


def test_bytes_are_counted_and_smaller_than_dense_codes() -> None:
    weight = ternary((300, 784), 4704)  # 2 %
    content, result = pack_ternary(Net(weight))
    [entry] = result.weights
    tensors = safetensors.torch.load(content)
    name = entry.name
    assert entry.bytes == sum(
        t.numel() * t.element_size() for k, t in tensors.items() if k.startswith(name)
    )
    assert entry.bytes == math.ceil(entry.entries * entry.bits / 8) + math.ceil(4704 / 8) + 4
    assert entry.binary_bytes == 300 * 784 // 8 + 4
    assert entry.ternary_bytes == 300 * 784 // 4 + 4
    assert result.binary_bytes / result.bytes > 5  # the abstract's claims, at its 98 % of zeros
    assert result.ternary_bytes / result.bytes > 10
    position = pack_ternary(Net(weight), code="position")[1].weights[0]
    assert (position.bits, position.entries) == (18, 4704)
    assert position.bytes == math.ceil(4704 * 18 / 8) + 588 + 4


def test_other_weights_stay_as_they_are(tmp_path: Path) -> None:
    several = SparseWeight((5, 6), 8)
    model = Net(ternary((4, 4), 5), several)
    with torch.no_grad():
        several.values.copy_(torch.linspace(1, 2, 8))
    result = save_ternary(model, tmp_path / "x")
    assert [w.name for w in result.weights] == ["layers.0.weight"]
    state = load_ternary(tmp_path / "x")
    assert state.keys() == model.state_dict().keys()
    assert torch.equal(state["layers.1.weight.values"], several.values)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3), "it has no sparse weights"),
        (
            Net(SparseWeight.from_dense(torch.tensor([[1.0, 2.0]]))),
            r"layers\.0\.weight have "
            r"values of several",
        ),
        (Net(SparseWeight.from_dense(torch.tensor([[1.0, math.inf]]))), "several magnitudes"),
    ],
)
def test_models_without_ternary_weights_are_refused(
    model: nn.Module, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_ternary(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="code must be"):
        pack_ternary(model, code="zip")  # type: ignore[arg-type]


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_ternary(Net(ternary((4, 4), 5)), tmp_path / "x")
    before = (tmp_path / "x").read_bytes()

    def fail(file: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(files, "sync_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_ternary(Net(ternary((4, 4), 6)), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def damaged(how: str) -> bytes:
    content, _ = pack_ternary(
        Net(ternary((4, 9), 5)), code="position" if how == "order" else "delta"
    )
    tensors = safetensors.torch.load(content)
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    [entry] = json.loads(metadata["weights"])
    key = "layers.0.weight"
    if how == "pickle":
        return b"\x80\x04K\x01."
    if how == "short":
        return content[:-9]
    if how == "format":
        metadata["format"] = "other"
    elif how == "missing":
        del tensors[f"{key}.signs"]
    elif how == "scale":
        tensors[f"{key}.scale"] = torch.tensor([math.nan])
    elif how == "index":
        tensors[f"{key}.index"] = tensors[f"{key}.index"][:-1].clone()
    elif how == "outside":
        tensors[f"{key}.index"].fill_(255)
    elif how == "order":
        tensors[f"{key}.index"].fill_(0)
    elif how == "type":
        tensors[f"{key}.signs"] = tensors[f"{key}.signs"].float()
    else:
        name, _, value = how.partition("=")
        entry[name] = json.loads(value)
    metadata["weights"] = json.dumps([entry])
    # so that what is inside is looked at
    metadata["sha256"] = tensor_file.content_sha256(tensors, metadata)
    return safetensors.torch.save(tensors, metadata)


@pytest.mark.parametrize(
    "how",
    [
        *("pickle", "short", "format", "missing", "scale", "index", "outside", "order", "type"),
        *(
            "connections=6",
            "connections=-1",
            "connections=4",
            "connections=true",
            "bits=0",
            "bits=60",
            "bits=3.0",
        ),
        *(
            "entries=99999999999999",
            'code="zip"',
            "shape=[4]",
            "shape=[4,-9]",
            "shape=[2,2]",
            'shape="44"',
            "name=7",
        ),
    ],
)
def test_damaged_files_are_refused(how: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(damaged(how))
    with pytest.raises(ValueError, match=r"is damaged|is not a (safetensors file|file of packed)"):
        load_ternary(tmp_path / "x")


def test_a_changed_sign_is_refused(tmp_path: Path) -> None:
    content, _ = pack_ternary(Net(ternary((4, 9), 5)))
    tensors, metadata = tensor_file.parse(content, "x")
    tensors["layers.0.weight.signs"] ^= 1
    (tmp_path / "x").write_bytes(tensor_file.pack(tensors, metadata))
    with pytest.raises(ValueError, match=r"x is damaged: sha256 \w{64}, expected \w{64}"):
        load_ternary(tmp_path / "x")

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewire.app.run_files import Prefix
from rewire.app.train import checkpoint
from rewire.app.train.checkpoint import Checkpoint, flatten, unflatten
from rewire.storage import files

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers()
nested = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=10,
)


@given(nested)
def test_values_come_back_through_json(value) -> None:
    assert unflatten(json.loads(json.dumps(flatten(value, {}))), {}) == value


def test_awkward_values_come_back() -> None:
    base = torch.arange(6.0)
    value = {
        "shared": [base, base[1:3], base.view(2, 3).t()],
        0: {"betas": (0.9, 0.999), "step": torch.tensor(3.0), "none": None},
        "$tensor": torch.tensor([], dtype=torch.int64),
        "inf": -math.inf,
        "bool": torch.tensor([True, False]),
    }
    tensors = {}
    skeleton = json.loads(json.dumps(flatten(value, tensors)))
    back = unflatten(skeleton, tensors)
    assert list(back) == list(value)
    for ours, theirs in zip(back["shared"], value["shared"], strict=True):
        assert torch.equal(ours, theirs)
    assert back[0]["betas"] == (0.9, 0.999)
    assert back["inf"] == -math.inf
    assert back["bool"].dtype == torch.bool


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match=r"state\.a\.1: a set cannot be saved"):
        flatten({"a": [1, {2}]}, {})


def make(step: int, value: float) -> Checkpoint:
    layer = {"name": "0.weight", "outputs": 2, "inputs": 3, "connections": 4}
    info = {"layers": [layer], "samples": {"train": 1, "validation": 0, "test": 1}}
    return Checkpoint(
        1, step, "c" * 64, Prefix(7, "d" * 64), 1.5, info, {"x": torch.full((3,), value), "n": 0.1}
    )


def test_round_trip_and_clean_up(tmp_path: Path) -> None:
    for step in (1, 2, 2, 2):
        checkpoint.save(tmp_path, make(step, step))
        loaded = checkpoint.load(tmp_path)
        assert loaded.step == step
        assert loaded.state["x"].tolist() == [step] * 3
        assert (loaded.epoch, loaded.metrics, loaded.seconds) == (1, Prefix(7, "d" * 64), 1.5)
        assert loaded.state["n"] == 0.1
        assert len(list(tmp_path.iterdir())) == 2


def test_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, make(1, 1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(file, content) -> None:
        file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint.save(tmp_path, make(2, 2))
    assert caught.value.filename == str(tmp_path / "checkpoint-2.safetensors")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

"""Reading files that may hold anything."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from rewire.storage import files, reading
from rewire.storage import tensors as tensor_file
from rewire.storage.reading import FileError


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "it is not JSON"),
        (b"", "it is not JSON"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' occurs twice in an object"),
        (b"[" * 100_000, "nested deeper than 64 times"),
        (b'{"a":' * 100_000, "nested deeper than 64 times"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64 times"),
        (b"[NaN]", "NaN is not a number of JSON"),
        (b"[-Infinity]", "-Infinity is not a number of JSON"),
        (b"[1e999]", "the number 1e999 is too large"),
        (b"9" * 5000, "an integer of 5000 digits"),
        (b'"\xff"', "it is not UTF-8 text"),
        (b'"\\ud800"', "it has half of a surrogate pair"),
        (b"[1] 2", "it is not JSON"),
    ],
)
def test_json_that_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(FileError) as caught:
        reading.parse_json(text, "the file")
    assert str(caught.value).startswith("the file is damaged: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_that_is_read() -> None:
    assert reading.parse_json(b'{"a": [1, -2.5, null, true, "\\ud83d\\ude00"]}', "") == {
        "a": [1, -2.5, None, True, "\U0001f600"]
    }
    assert reading.parse_json(b"[" * 64 + b"]" * 64, "")
    assert reading.parse_json(b"[-Infinity, 1e999]", "", finite=False) == [
        -float("inf"),
        float("inf"),
    ]
    assert reading.parse_json(str(2**64).encode(), "") == 2**64


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "five").write_bytes(b"12345")
    for path, error, message in (
        (tmp_path / "pipe", FileError, "not an ordinary file"),
        (Path("/dev/zero"), FileError, "not an ordinary file"),
        (Path("a\0b"), FileError, "cannot be the name of a file"),
        (tmp_path, IsADirectoryError, "Is a directory"),
        (tmp_path / "loop", OSError, "Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), OSError, "File name too long"),
        (tmp_path / "five" / "x", NotADirectoryError, "Not a directory"),
        (tmp_path / "none", FileNotFoundError, "No such file"),
    ):
        with pytest.raises(error, match=message) as caught:
            reading.read_bytes(path)
        if isinstance(caught.value, OSError):
            assert caught.value.filename == str(path)
    assert reading.read_bytes(tmp_path / "five", 5) == b"12345"
    with pytest.raises(FileError, match="has 5 bytes, allowed are 4"):
        reading.read_bytes(tmp_path / "five", 4)


TENSORS = {
    "turned": torch.arange(6.0).view(2, 3).t(),
    "shared": torch.arange(6.0)[1:3],
    "empty": torch.zeros(2, 0, 3, dtype=torch.int64),
    "scalar": torch.tensor(3, dtype=torch.uint8),
    "bits": torch.tensor([True, False, True]),
    "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
    "complex": torch.tensor([1 + 2j]),
}


def test_tensors_are_written_as_safetensors_would(tmp_path: Path) -> None:
    expected = tensor_file.pack(TENSORS, {"key": "text"})
    assert tensor_file.write(tmp_path / "x", TENSORS, {"key": "text"}) == files.sha256_bytes(
        expected
    )
    assert (tmp_path / "x").read_bytes() == expected
    assert tensor_file.size(TENSORS) == len(tensor_file.pack(TENSORS))
    whole = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    few = {name: whole[name] for name in ("turned", "empty", "bits")}
    assert tensor_file.pack(few, {"key": "text"}) == save(few, {"key": "text"})
    back, metadata = tensor_file.read(tmp_path / "x")
    assert metadata == {"key": "text"}
    for found in (back, load(expected), load(save(whole))):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert tensor_file.content_sha256(back, metadata) == tensor_file.content_sha256(
        TENSORS, metadata
    )
    with pytest.raises(TypeError, match=r"x: a tensor of torch\.complex128"):
        tensor_file.pack({"x": torch.zeros(1, dtype=torch.complex128)})


def test_the_sum_tells_every_change_of_content() -> None:
    zero = torch.zeros(2, 3)
    variants = [
        ({"a": zero}, {}),
        ({"b": zero}, {}),
        ({"a": zero.view(3, 2)}, {}),
        ({"a": zero.int()}, {}),
        ({"a": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])}, {}),
        ({"a": zero}, {"k": "v"}),
        ({"a": zero}, {"k": "w"}),
    ]
    assert len({tensor_file.content_sha256(*variant) for variant in variants}) == len(variants)
    assert tensor_file.content_sha256({"a": zero}, {"sha256": "x"}) == tensor_file.content_sha256(
        {"a": zero}, {}
    )


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 30))
def test_pieces_arrive_whole_in_blocks(pieces: list[bytes], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE", size)
        blocks = list(files._blocks(pieces))
    assert b"".join(blocks) == b"".join(pieces)
    assert all(len(block) < 2 * size for block in blocks)
    assert len(blocks) >= 1


def test_long_names_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "ä" * 127):
        files.write_atomic(tmp_path / name, b"content")
        assert (tmp_path / name).read_bytes() == b"content"
    if sys.platform == "linux":
        with pytest.raises(OSError, match="too long") as caught:
            files.write_atomic(tmp_path / ("x" * 256), b"content")
        assert caught.value.filename == str(tmp_path / ("x" * 256))
    assert len(list(tmp_path.iterdir())) == 2


def test_the_lock_of_a_folder(tmp_path: Path) -> None:
    waited = []
    with files.lock_folder(tmp_path) as held:
        assert held
        with pytest.raises(files.LockedError), files.lock_folder(tmp_path):
            pass

        def stop() -> None:
            waited.append(1)
            if len(waited) == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), files.lock_folder(tmp_path, wait=stop):
            pass
    with files.lock_folder(tmp_path):
        assert list(tmp_path.iterdir()) == []

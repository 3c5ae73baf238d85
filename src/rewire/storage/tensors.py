"""Tensors in safetensors files: written piece by piece, read as a whole and checked.

The library's own writer copies everything twice, in Rust, where running out of memory ends the
process instead of raising an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewire.storage import files, reading
from rewire.storage.reading import FileError

__all__ = ["check_sum", "content_sha256", "pack", "parse", "read", "size", "write"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """By width of the numbers, widest first, so that all are aligned; then by name."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in _ordered(tensors):
        if tensor.dtype not in _NAMES:
            raise TypeError(
                f"{name}: a tensor of {tensor.dtype} cannot be put into a safetensors file"
            )
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's numbers, row by row; a copy only if they are not so in the CPU's memory
    already.
    """
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    array: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array.data


def _pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> Iterator[bytes | memoryview]:
    yield _header(tensors, metadata)
    for _, tensor in _ordered(tensors):
        yield _bytes(tensor)


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file atomically and return its sha256.

    Tensors may be on any device, have any strides and share memory: each is written in full.
    Memory: that of one tensor, and none for tensors that are contiguous on the CPU. Raises OSError,
    or TypeError for a dtype that the format does not have.
    """
    return files.write_pieces(path, _pieces(tensors, metadata))


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of the file that `write` writes."""
    return b"".join(_pieces(tensors, metadata))


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `write` writes, without metadata."""
    return len(_header(tensors, None)) + sum(t.numel() * t.element_size() for t in tensors.values())


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises OSError or FileError.

    Memory: twice the file's size.
    """
    return parse(reading.read_bytes(path), str(path))


def parse(content: bytes, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata from the content of a safetensors file. Raises FileError.

    ``where``: where the content is from, for messages.
    """
    metadata = reading.parse_metadata(content, where)
    try:
        return safetensors.torch.load(content), metadata
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FileError(
            f"{where} is damaged: it is not a safetensors file ({reading.brief(error)})"
        ) from None


def content_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Checksum of names, dtypes, shapes, numbers and metadata, independent of their layout in a
    file.

    Leaves out the metadata ``sha256``, where a file can have its own checksum.
    """
    digest = hashlib.sha256()
    rest = {key: text for key, text in metadata.items() if key != "sha256"}
    digest.update(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def check_sum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> None:
    """Raise FileError unless the content has the checksum in its metadata ``sha256``."""
    if "sha256" not in metadata:
        raise FileError(
            f"{where} is damaged or of an earlier version of rewire: it has no checksum"
        )
    if (found := content_sha256(tensors, metadata)) != metadata["sha256"]:
        raise FileError(
            f"{where} is damaged: sha256 {found}, expected {reading.brief(metadata['sha256'])}"
        )

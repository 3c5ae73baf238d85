"""Sparse ternary weights in a file: a sign bit and an index for each connection.

The file is a safetensors file (no pickle). Its metadata have ``format`` = ``rewire-ternary-1``
and, in ``weights``, as JSON, one object per packed weight: ``name``, ``shape``, ``connections``
(K), ``code``, ``bits``, ``entries``. A packed weight has three tensors, of which the first two are
fields of bits, least significant bit first, in bytes (uint8):

    name.index   ``entries`` fields of ``bits`` bits: positions in M = rows x cols, row by row
                 (ascending), in one of two codes
                 position   the flat position of each; bits = those of M - 1
                 delta      empty positions since the last connection; the largest of ``bits``
                            stands for as many empty positions without a connection after them
    name.signs   K fields of one bit, 1 for negative, in the same order
    name.scale   one number of the weight's dtype, the magnitude of all values

All other entries of the model's state_dict (biases, normalization, weights of other layers) are
stored unchanged. The metadata ``sha256`` is the checksum of everything else
(`rewire.storage.tensors.content_sha256`).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rewire import topology
from rewire.nn import SparseWeight, sparse_weights
from rewire.storage import files, reading
from rewire.storage import tensors as tensor_file

__all__ = ["PackResult", "PackedWeight", "load_ternary", "pack_ternary", "save_ternary"]

FORMAT = "rewire-ternary-1"
Code = Literal["auto", "delta", "position"]

#: The most bits of a field, so that positions are exact in every JSON reader, and sums in int64.
_WIDEST = 53

_Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight: code, width of an index field in bits, number of fields, and bytes.

    bytes: of index, signs and scale.
    binary_bytes, ternary_bytes: of the same matrix stored densely, with 1 and 2 bits per weight
        and one scale.
    """

    name: str
    shape: tuple[int, ...]
    connections: int
    code: str
    bits: int
    entries: int
    bytes: int
    binary_bytes: int
    ternary_bytes: int


@dataclass(frozen=True)
class PackResult:
    """The packed weights, and the bytes of the whole file."""

    weights: tuple[PackedWeight, ...]
    file_bytes: int

    @property
    def bytes(self) -> int:
        """Of all packed weights."""
        return sum(w.bytes for w in self.weights)

    @property
    def binary_bytes(self) -> int:
        """Of the same weights, dense, at one bit each."""
        return sum(w.binary_bytes for w in self.weights)

    @property
    def ternary_bytes(self) -> int:
        """Of the same weights, dense, at two bits each."""
        return sum(w.ternary_bytes for w in self.weights)


def pack_ternary(model: nn.Module, *, code: Code = "auto") -> tuple[bytes, PackResult]:
    """The content of the file that `save_ternary` writes, and its sizes.

    Args:
        model: with at least one sparse weight whose values are all plus or minus one number. Sparse
            weights of several magnitudes, and everything else, are stored unchanged.
        code: of the index, "delta" or "position"; "auto" takes the smaller one for each weight.
            "delta" uses the field width that makes it smallest.

    Connections are packed in (row, col) order; empty slots are left out. Raises ValueError for
    another code or if no weight is ternary. Cost: O(K bits) time and memory.
    """
    if code not in ("auto", "delta", "position"):
        raise ValueError(f"code must be 'auto', 'delta' or 'position', not {code!r}")
    state = dict(model.state_dict())
    packed, several = [], []
    for name, weight in sparse_weights(model):
        found = _pack(name, weight, code)
        if found is None:
            several.append(name)
            continue
        entry, tensors = found
        for part in ("values", "rows", "cols", "shape"):
            del state[f"{name}.{part}"]
        state |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
        packed.append(entry)
    if not packed:
        magnitudes = f"{', '.join(several)} have values of several magnitudes"
        what = magnitudes if several else "it has no sparse weights"
        raise ValueError(
            f"no weight of this model is sparse and ternary: {what}; train it with the method "
            "ternary"
        )
    keys = ("name", "shape", "connections", "code", "bits", "entries")
    listed = json.dumps([{key: getattr(w, key) for key in keys} for w in packed])
    metadata = {"format": FORMAT, "weights": listed}
    metadata["sha256"] = tensor_file.content_sha256(state, metadata)
    content = tensor_file.pack(state, metadata)
    return content, PackResult(tuple(packed), len(content))


def save_ternary(model: nn.Module, path: str | Path, *, code: Code = "auto") -> PackResult:
    """Write ``model`` with its ternary weights packed (see the module), and return the sizes.

    Arguments and errors are those of `pack_ternary`. The file is complete or absent at every
    moment.
    """
    content, result = pack_ternary(model, code=code)
    files.write_atomic(Path(path), content)
    return result


def load_ternary(path: str | Path) -> dict[str, Tensor]:
    """Read what `save_ternary` wrote: a state_dict for ``model.load_state_dict``, exact to the bit.

    The model must have sparse layers of the same shapes; topology and number of connections come
    from the file. Raises OSError if there is no such file, ValueError for one that is of another
    kind, damaged or changed. Cost: O(K bits).
    """
    state, metadata = tensor_file.read(Path(path))
    if metadata.get("format") != FORMAT:
        found = reading.brief(repr(metadata.get("format")))
        raise ValueError(f"{path} is not a file of packed ternary weights: its format is {found}")
    tensor_file.check_sum(state, metadata, str(path))
    try:
        for entry in reading.parse_json(metadata["weights"].encode(), f"{path}, weights,"):
            name = str(entry["name"])
            parts = {part: state.pop(f"{name}.{part}") for part in ("index", "signs", "scale")}
            state |= {f"{name}.{part}": t for part, t in _unpack(entry, **parts).items()}
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {reading.brief(repr(error))}") from None
    return state


# --- one weight -----------------------------------------------------------------------------------


def _pack(
    name: str, weight: SparseWeight, code: Code
) -> tuple[PackedWeight, dict[str, Tensor]] | None:
    rows, cols, values = (t.detach().cpu() for t in weight.coo())
    sizes = values.abs()
    scale = sizes[:1].clone() if sizes.numel() else values.new_ones(1)
    if not bool(torch.isfinite(scale).all() and (scale > 0).all() and (sizes == scale).all()):
        return None
    positions: _Numbers = (rows * weight.matrix_shape[1] + cols).numpy()
    if (weight.size - 1).bit_length() > _WIDEST:
        raise ValueError(
            f"{name} has {weight.size} potential connections, and positions have at most {_WIDEST} "
            "bits"
        )
    chosen, bits, fields = _encode(positions, weight.size, code)
    index = _to_bits(fields, bits)
    signs = _to_bits(torch.signbit(values).numpy().astype(np.int64), 1)
    overhead = scale.element_size()
    entry = PackedWeight(
        name=name,
        shape=tuple(weight.shape),
        connections=len(positions),
        code=chosen,
        bits=bits,
        entries=len(fields),
        bytes=index.numel() + signs.numel() + overhead,
        binary_bytes=-(-weight.size // 8) + overhead,
        ternary_bytes=-(-2 * weight.size // 8) + overhead,
    )
    return entry, {"index": index, "signs": signs, "scale": scale}


def _unpack(
    entry: dict[str, Any], index: Tensor, signs: Tensor, scale: Tensor
) -> dict[str, Tensor]:
    shape = [int(n) for n in entry["shape"]]
    rows, cols = topology.matrix_size(shape)
    count, bits, entries, code = (entry[key] for key in ("connections", "bits", "entries", "code"))
    size, whole = rows * cols, all(isinstance(n, int) for n in (count, bits, entries))
    if not whole or code not in ("delta", "position"):
        raise ValueError(f"its entry is {entry}")
    if not (1 <= bits <= _WIDEST and 0 <= count <= min(size, entries) and size <= 2**_WIDEST):
        raise ValueError(
            f"{count} connections of {size} cannot be in {entries} fields of {bits} bits"
        )
    one = scale.numel() == 1 and scale.is_floating_point()
    if not one or not bool(torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("the scale is not one positive number")
    fields = _from_bits(index, bits, entries)
    if code == "delta":
        largest = 2**bits - 1
        if entries and (math.log2(entries) + bits > 62 or int(fields.sum()) > size):
            raise ValueError("connections lie outside of the matrix")
        ends = fields < largest
        positions = (np.cumsum(fields + ends) - 1)[ends]
    else:
        positions = fields
    if len(positions) != count:
        raise ValueError(f"the index has {len(positions)} connections, not {count}")
    inside = not count or (positions[0] >= 0 and positions[-1] < size)
    if not inside or bool((np.diff(positions) <= 0).any()):
        raise ValueError("connections are out of order or lie outside of the matrix")
    values = torch.where(torch.from_numpy(_from_bits(signs, 1, count)) > 0, -scale, scale)
    at = torch.from_numpy(positions)
    kind = topology.index_dtype(rows, cols, max(count, 1))
    found = {"values": values, "rows": (at // cols).to(kind), "cols": (at % cols).to(kind)}
    if not count:  # one empty slot, as in `rewire.to_sparse`
        found = {"values": torch.zeros_like(scale), "rows": torch.full((1,), -1, dtype=kind)}
        found["cols"] = found["rows"].clone()
    return found | {"shape": torch.tensor(shape, dtype=torch.int64)}


# --- codes ----------------------------------------------------------------------------------------


def _encode(positions: _Numbers, size: int, code: Code) -> tuple[str, int, _Numbers]:
    """(code, bits, fields) for ascending positions below ``size``."""
    width = max((size - 1).bit_length(), 1)
    gaps = np.diff(positions, prepend=-1) - 1
    if code != "position":
        entries = [len(gaps) + int((gaps // (2**b - 1)).sum()) for b in range(1, width + 1)]
        bits = min(range(1, width + 1), key=lambda b: b * entries[b - 1])
        if code == "delta" or bits * entries[bits - 1] < width * len(positions):
            return "delta", bits, _deltas(gaps, 2**bits - 1)
    return "position", width, positions


def _deltas(gaps: _Numbers, largest: int) -> _Numbers:
    """Each gap as fields of at most ``largest``, of which only the last is smaller."""
    fields = np.full(len(gaps) + int((gaps // largest).sum()), largest, dtype=np.int64)
    fields[np.cumsum(gaps // largest + 1) - 1] = gaps % largest
    return fields


def _to_bits(fields: _Numbers, bits: int) -> Tensor:
    each = (fields[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(each.astype(np.uint8).reshape(-1), bitorder="little"))


def _from_bits(packed: Tensor, bits: int, entries: int) -> _Numbers:
    if packed.dtype != torch.uint8 or packed.shape != (-(-entries * bits // 8),):
        raise ValueError(
            f"{entries} fields of {bits} bits are not {tuple(packed.shape)} of {packed.dtype}"
        )
    flat = np.unpackbits(packed.numpy(), count=entries * bits, bitorder="little")
    each = flat.reshape(entries, bits).astype(np.int64)
    found: _Numbers = (each << np.arange(bits)).sum(1)
    return found

"""Files changed at random: bytes, JSON, tensors in safetensors, gzip."""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
import struct
from typing import Any

import torch

from rewire.storage import tensors as tensor_file

NASTY: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    255,
    2**30,
    2**31,
    2**40,
    2**53 + 1,
    2**63 - 1,
    2**63,
    10**30,
    10**300,
    0.5,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "0" * 64,
    "\u2028",
    "../x",
    "\ud800",
    [],
    {},
    [[]],
    [1],
    {"$tensor": "x"},
    {"$dict": [[1]]},
    {"$tuple": 3},
    [0] * 1000,
)


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as (container, key)."""
    found: list[tuple[Any, Any]] = []
    for key, item in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        found.append((value, key))
        if isinstance(item, dict | list):
            found += spots(item)
    return found


def change_json(text: bytes, dice: random.Random) -> bytes:
    """Change one or two places of a JSON text of one or more lines."""
    lines = text.decode().splitlines() if text.count(b"}\n{") else [text.decode()]
    at = dice.randrange(len(lines))
    value = json.loads(lines[at])
    for _ in range(dice.choice((1, 1, 2))):
        places = spots(value)
        if not places:
            break
        container, key = dice.choice(places)
        how = dice.random()
        if how < 0.15:
            del container[key]
        elif how < 0.3 and isinstance(container[key], int) and not isinstance(container[key], bool):
            container[key] += dice.choice((-1, 1, 2**20, -(2**20)))
        elif how < 0.4 and isinstance(container[key], float):
            container[key] *= 1 + 2**-20
        else:
            container[key] = copy.deepcopy(dice.choice(NASTY))
    lines[at] = json.dumps(value)
    if dice.random() < 0.05:
        lines[at] = dice.choice(
            (
                "[" * 100_000,
                '{"a":' * 5000,
                lines[at][:1] + '"a": 1, "a": 2, ' + lines[at][1:],
                "9" * 9999,
            )
        )
    return ("\n".join(lines) + "\n").encode()


def change_tensors(content: bytes, dice: random.Random) -> bytes:
    """Change numbers, shapes or the header of a safetensors file, which stays one."""
    if dice.random() < 0.4:
        length = int.from_bytes(content[:8], "little")
        header = change_json(content[8 : 8 + length], dice).strip()
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    tensors, metadata = tensor_file.parse(content, "x")
    name = dice.choice(sorted(tensors))
    tensor = tensors[name].clone()
    how = dice.random()
    if tensor.numel() and how < 0.6:
        extreme = (
            torch.iinfo(tensor.dtype)
            if not tensor.dtype.is_floating_point and tensor.dtype != torch.bool
            else None
        )
        choices = (
            [0, 1, -1, 2**30]
            if extreme is None
            else [0, 1, extreme.min, extreme.max, extreme.max // 2]
        )
        flat = tensor.reshape(-1).clone()
        flat[dice.randrange(tensor.numel())] = dice.choice(choices)
        tensor = flat.reshape(tensor.shape)
    elif how < 0.75:
        tensor = tensor.reshape(-1)[: dice.randrange(tensor.numel() + 1)].clone()
    elif how < 0.9:
        tensor = tensor.to(
            dice.choice((torch.float32, torch.float16, torch.int64, torch.int8, torch.bool))
        )
    else:
        tensor = tensor.reshape(1, *tensor.shape)
    tensors[name] = tensor
    for key in list(metadata):
        if key != "sha256" and dice.random() < 0.3 and metadata[key][:1] in "[{":
            metadata[key] = (
                change_json(metadata[key].encode(), dice).decode("utf-8", "replace").strip()
            )
    return tensor_file.pack(tensors, metadata)


def change_bytes(content: bytes, dice: random.Random) -> bytes:
    """Change a file whatever it holds."""
    found = bytearray(content)
    at = dice.randrange(max(1, len(found)))
    many = dice.choice((1, 2, 7, 64, 1000))
    how = dice.randrange(8)
    if how == 0 and found:
        found[at] ^= 1 << dice.randrange(8)
    elif how == 1 and found:
        found[at] = dice.randrange(256)
    elif how == 2:
        del found[at:]
    elif how == 3:
        del found[at : at + many]
    elif how == 4:
        found[at:at] = dice.randbytes(many)
    elif how == 5:
        found[at:at] = found[at : at + many]
    elif how == 6:
        found[at : at + many] = bytes(len(found[at : at + many]))
    else:
        found[0:8] = struct.pack(
            "<Q", dice.choice((0, 1, len(found), 2**31, 2**40, 2**63, 2**64 - 1))
        )
    return bytes(found)


def change_gzip(content: bytes, dice: random.Random) -> bytes:
    """Change what is inside a gzip file, or how much."""
    inside = gzip.decompress(content)
    if dice.random() < 0.3:
        inside += bytes(dice.choice((1, 1000, 30 << 20)))
    else:
        inside = change_bytes(inside, dice)
    return gzip.compress(inside, dice.choice((1, 9)), mtime=0)


def changed(name: str, content: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.4:
        return change_bytes(content, dice)
    if name.endswith((".json", ".jsonl")):
        return change_json(content, dice)
    if content[:2] == b"\x1f\x8b":
        return change_gzip(content, dice)
    return change_tensors(content, dice)

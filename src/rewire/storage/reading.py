"""Reads files with any content, within limits, and says in one line what is wrong with them.

All readers of the project begin here. If the system refuses (no such file, no permission), the
error is an OSError that names the file; if the content is wrong, it is a `FileError`. Nothing is
unpickled.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["FileError", "brief", "parse_json", "parse_metadata", "read_bytes", "read_json"]

MEBIBYTE = 1 << 20

#: The deepest nesting of brackets in a JSON file; ours need ten.
DEPTH = 64

#: Digits; unsigned 64-bit numbers, the largest that we write, have 20.
_LONGEST_INTEGER = 40
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class FileError(ValueError):
    """A file with wrong content; the message is one line that begins with the file's name."""


def brief(text: object, most: int = 300) -> str:
    """A text of any length as one line of at most ``most`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 4] + " ..."


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The content of an ordinary file.

    Args:
        path: any path. Refuses a folder or a device, and a pipe without waiting for its writer.
        limit: the most bytes that the file may have; None for no limit.

    Raises OSError, with the file's name, or FileError. Memory: the size of the file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        extra = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, os.O_RDONLY | extra)
    except ValueError:  # a null character
        raise FileError(f"{str(path)!r} cannot be the name of a file") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise FileError(f"{path} is not an ordinary file")
    with open(handle, "rb", buffering=0) as file:
        size = status.st_size
        if limit is not None and size > limit:
            raise FileError(f"{path} has {size} bytes, allowed are {limit}")
        content = bytearray()
        try:
            # Ask for one byte more, to find out whether the file grows.
            while len(content) <= size and (piece := file.read(size + 1 - len(content))):
                content += piece
        except OSError as error:
            error.filename = str(path)
            raise
    if len(content) > size:
        raise FileError(f"{path} grew while it was read")
    return bytes(content)


def read_json(path: Path, limit: int = 64 * MEBIBYTE, *, finite: bool = True) -> Any:
    """The JSON value in a file; see `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, limit), str(path), finite=finite)


def parse_json(data: bytes, where: str, *, finite: bool = True) -> Any:
    """Parse strict JSON in UTF-8.

    Args:
        data: the text.
        where: where it is from, for messages.
        finite: refuse NaN, Infinity and numbers that are too large for a float.

    Raises FileError, also for names that occur twice in an object, nesting deeper than `DEPTH`,
    integers of more than 40 digits, and half a surrogate pair, which cannot be written to a file.
    """

    def refuse(reason: str) -> NoReturn:
        raise FileError(f"{where} is damaged: {reason}")

    def integer(text: str) -> int:
        if len(text) > _LONGEST_INTEGER:
            refuse(f"an integer of {len(text)} digits")
        return int(text)

    def number(text: str) -> float:
        value = float(text)
        if finite and not math.isfinite(value):
            refuse(f"the number {text[:40]} is too large")
        return value

    def constant(text: str) -> float:
        return float(text) if not finite else refuse(f"{text} is not a number of JSON")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            refuse(f"{twice[:100]!r} occurs twice in an object")
        return found

    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_int=integer,
            parse_float=number,
            parse_constant=constant,
            object_pairs_hook=members,
        )
        if data.count(b"[") + data.count(b"{") > DEPTH and _depth(value) > DEPTH:
            refuse(f"brackets are nested deeper than {DEPTH} times")
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except FileError:
        raise
    except UnicodeDecodeError as error:
        refuse(f"it is not UTF-8 text (byte {error.start})")
    except UnicodeEncodeError:
        refuse("it has half of a surrogate pair")
    except RecursionError:
        refuse(f"brackets are nested deeper than {DEPTH} times")
    except ValueError as error:
        refuse(f"it is not JSON ({error})")
    return value


def _depth(value: Any) -> int:
    """The deepest nesting of dicts and lists, without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        inner = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [item for items in inner for item in items]
    return depth


def parse_metadata(content: bytes, where: str) -> dict[str, str]:
    """The metadata of a safetensors file: strings by name. Raises FileError."""
    length = int.from_bytes(content[:8], "little")
    header = None
    if 8 + length <= len(content):
        header = parse_json(content[8 : 8 + length], where)
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise FileError(f"{where} is damaged: it is not a safetensors file")
    return metadata

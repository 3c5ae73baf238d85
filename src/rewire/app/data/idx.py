"""The idx format of the MNIST family: two zero bytes, a type code, the number of dimensions, the
dimensions as big-endian 32-bit integers, then the values and nothing else.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UNSIGNED_BYTE = 0x08
TYPE_NAMES = {
    0x08: "uint8",
    0x09: "int8",
    0x0B: "int16",
    0x0C: "int32",
    0x0D: "float32",
    0x0E: "float64",
}


class IdxError(ValueError):
    """Bytes that are not the idx file they should be."""


def content_size(shape: Sequence[int]) -> int:
    """Bytes of an unsigned-byte idx file of this shape."""
    return 4 + 4 * len(shape) + math.prod(shape)


def unzip(packed: bytes, size: int) -> bytes:
    """The content of a gzip file, its CRC and length checked.

    ``size`` is the most bytes that it may have: a small file can hold a thousand times its size, of
    which no more than this is ever unpacked. One that is cut short, damaged or holds more raises
    IdxError.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            content = file.read(size + 1)
            if len(content) > size:
                raise IdxError(f"the gzip file holds more than {size} bytes")
            return content
    except EOFError:
        raise IdxError("the gzip file is cut short") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise IdxError(f"the gzip file is damaged ({error})") from None


def parse(content: bytes, shape: Sequence[int | None]) -> NDArray[np.uint8]:
    """Read an unsigned-byte idx file of the given shape, None where any size is allowed.

    Every byte is accounted for: magic, type, number and size of the dimensions, and exact length.
    """
    if len(content) < 4:
        raise IdxError(f"{len(content)} bytes are too few for an idx header")
    zero_0, zero_1, kind, dimensions = content[:4]
    if zero_0 or zero_1:
        raise IdxError(f"it begins with {content[:4].hex(' ')}, not with the idx magic 00 00")
    if kind != UNSIGNED_BYTE:
        raise IdxError(
            f"its values are {TYPE_NAMES.get(kind, f'of unknown type {kind:#04x}')}, not uint8"
        )
    if dimensions != len(shape):
        raise IdxError(f"it has {dimensions} dimensions, not {len(shape)}")
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise IdxError(f"{len(content)} bytes are too few for a header of {dimensions} dimensions")
    found = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    for size, wanted in zip(found, shape, strict=True):
        if wanted is not None and size != wanted:
            allowed = " x ".join("any" if s is None else str(s) for s in shape)
            raise IdxError(f"its shape is {' x '.join(map(str, found))}, not {allowed}")
    if len(content) - header != math.prod(found):
        raise IdxError(
            f"{' x '.join(map(str, found))} needs {math.prod(found)} values, the file has "
            f"{len(content) - header}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(found)

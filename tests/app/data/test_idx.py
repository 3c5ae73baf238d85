import gzip
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewire.app.data import idx


def pack(values: np.ndarray) -> bytes:
    return (
        struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    )


GOOD = pack(np.arange(12, dtype=np.uint8).reshape(3, 2, 2))


def test_reads_values_in_shape() -> None:
    assert np.array_equal(idx.parse(GOOD, (3, 2, 2)), np.arange(12).reshape(3, 2, 2))
    assert idx.parse(GOOD, (None, 2, 2)).shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"\x00\x00\x08", "3 bytes are too few"),
        (b"\x1f\x8b" + GOOD[2:], "begins with 1f 8b 08 03"),
        (GOOD[:2] + b"\x0d" + GOOD[3:], "float32, not uint8"),
        (GOOD[:2] + b"\x77" + GOOD[3:], "unknown type 0x77"),
        (GOOD[:3] + b"\x01" + GOOD[4:], "1 dimensions, not 3"),
        (GOOD[:9], "too few for a header of 3"),
        (GOOD[:-1], "needs 12 values, the file has 11"),
        (GOOD + b"x", "needs 12 values, the file has 13"),
        (GOOD[:4] + b"\x00\x00\x00\x04" + GOOD[8:], "shape is 4 x 2 x 2, not 3 x 2 x 2"),
        (GOOD[:4] + b"\xff\xff\xff\xff" + GOOD[8:], "shape is 4294967295 x 2 x 2"),
    ],
)
def test_refuses(content: bytes, message: str) -> None:
    with pytest.raises(idx.IdxError, match=message):
        idx.parse(content, (3, 2, 2))


@given(st.binary(max_size=64))
def test_any_bytes_parse_or_are_refused(content: bytes) -> None:
    try:
        values = idx.parse(content, (None,))
    except idx.IdxError:
        return
    assert values.nbytes == len(content) - 8


@given(st.integers(0, 200), st.integers(0, 255))
def test_one_wrong_byte_in_gzip_never_passes_unseen(at: int, byte: int) -> None:
    packed = bytearray(gzip.compress(GOOD, mtime=0))
    at = 10 + at % (len(packed) - 10)  # the ten header bytes hold a time and a system: not content
    changed = packed[at] != byte
    packed[at] = byte
    try:
        content = idx.unzip(bytes(packed), len(GOOD))
    except idx.IdxError:
        assert changed
    else:
        assert content == GOOD


def test_cut_short() -> None:
    packed = gzip.compress(GOOD)
    for length in range(len(packed)):
        if length == 0:
            # gzip calls an empty file empty; the idx header is then missing
            assert idx.unzip(b"", 100) == b""
            continue
        with pytest.raises(idx.IdxError, match=r"cut short|damaged"):
            idx.unzip(packed[:length], len(GOOD))


def test_no_more_is_unpacked_than_there_may_be() -> None:
    """A file of 100 kB that holds 100 MB costs what the 12 bytes cost that it should hold."""
    bomb = gzip.compress(bytes(100 << 20), 9)
    assert len(bomb) < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(idx.IdxError, match="holds more than 12 bytes"):
            idx.unzip(bomb, 12)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert idx.unzip(gzip.compress(GOOD), idx.content_size((3, 2, 2))) == GOOD

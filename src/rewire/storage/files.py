"""Files that are whole or absent, and that no two processes write at once: atomic writes, locks,
checksums.

The five functions that touch the disk for a write stand alone and by name, so that tests can crash
a run at every single one of them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

#: Files whose names begin so are writes that never finished; nothing ever reads them.
TEMPORARY_PREFIX = ".unfinished-"

#: Bytes that are written or hashed at a time.
PIECE = 1 << 20

# A file system that has no locks answers with one of these.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LockedError(Exception):
    """Another process holds the lock."""


# --- what touches the disk ------------------------------------------------------------------------


def write_bytes(file: BinaryIO, data: bytes) -> None:
    """Write all of `data`."""
    file.write(data)


def sync_file(file: BinaryIO) -> None:
    """Bring the file's content to the disk."""
    file.flush()
    os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """Give `source` the name `target`, in one step."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """Delete a file; that it is gone already is no error."""
    path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the folder's list of names to the disk (a rename is only safe after this)."""
    if os.name == "nt":  # Windows cannot open a folder; its file system journals names
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- atomic writes --------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> str:
    """Write a file so that at every moment `path` holds its old content or its new one, never a
    part.

    A write that fails (a full disk) leaves the old content and removes the temporary file. Returns
    the sha256 of the content.
    """
    return write_pieces(path, [data])


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """`write_atomic` of content that comes in pieces and is never held as a whole.

    Small pieces are put together, so that a file of many of them is written in few calls. The
    temporary file has a name of its own, so two processes may write the same file at once: the last
    to finish wins.
    """
    # The name is cut to 200 bytes: with the target's own the temporary one could exceed the
    # system's 255.
    short = os.fsdecode(os.fsencode(path.name)[:200])
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{short}-{secrets.token_hex(4)}")
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            for block in _blocks(pieces):
                digest.update(block)
                write_bytes(file, block)
            sync_file(file)
        rename(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        # what the user asked for, not the temporary name or none at all
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise
    return digest.hexdigest()


def _blocks(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The pieces, small ones joined and large ones cut, in blocks of at most about `PIECE` bytes;
    at least one.
    """
    waiting = bytearray()
    any_yet = False
    for piece in pieces:
        view = memoryview(piece).cast("B")
        for first in range(0, len(view), PIECE):
            waiting += view[first : first + PIECE]
            if len(waiting) >= PIECE:
                any_yet = True
                yield bytes(waiting)
                waiting.clear()
    if waiting or not any_yet:
        yield bytes(waiting)


def remove_unfinished(folder: Path) -> None:
    """Remove what writes that were killed left behind; call it while holding the folder's lock."""
    for path in folder.glob(TEMPORARY_PREFIX + "*"):
        remove(path)


# --- locks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock_folder(folder: Path, *, wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the folder's lock inside the ``with``; the system lets go when this process ends,
    however it ends.

    Args:
        folder: an existing folder.
        wait: called every tenth of a second until the lock is free; None raises `LockedError`
            instead of waiting.

    Yields whether the lock is held: Windows and some network file systems have none. Raises OSError
    for a folder that cannot be opened. No file is made, so nothing stale can be left behind.
    """
    try:
        import fcntl
    except ImportError:  # no such lock on Windows
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        held = True
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if wait is None:
                    raise LockedError(str(folder)) from None
                wait()
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    error.filename = str(folder)
                    raise
                held = False
                break
        yield held
    finally:
        os.close(handle)


# --- checksums ------------------------------------------------------------------------------------


def sha256_bytes(data: bytes) -> str:
    """Checksum of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Checksum of a file, in hex, read in pieces."""
    return sha256_prefix(path, None).hexdigest()


def sha256_prefix(path: Path, length: int | None) -> hashlib._Hash:
    """The checksum, to go on with, of the first `length` bytes of a file (None: of all), read in
    pieces.

    The file may be shorter than `length`.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = length
        while left is None or left > 0:
            piece = file.read(PIECE if left is None else min(PIECE, left))
            if not piece:
                break
            digest.update(piece)
            left = None if left is None else left - len(piece)
    return digest

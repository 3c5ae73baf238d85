"""Files that are complete or absent, and that only one process writes: atomic writes, locks,
checksums.

Five small functions do all that a write does to the disk, so that tests can crash a run at each
call.
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

#: Names of files that are still being written, or whose writing was killed, begin so.
TEMPORARY_PREFIX = ".unfinished-"

#: Bytes that are written or hashed at a time.
PIECE = 1 << 20

#: The errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LockedError(Exception):
    """Another process holds the lock."""


# --- what touches the disk ------------------------------------------------------------------------


def write_bytes(file: BinaryIO, data: bytes) -> None:
    """Write all of `data`."""
    file.write(data)


def sync_file(file: BinaryIO) -> None:
    """Make sure that the file's content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """Give `source` the name `target`, atomically."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """Delete a file, if it exists."""
    path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make sure that the folder's list of names is on the disk, without which a rename is not
    safe.
    """
    if os.name == "nt":  # Windows cannot open a folder, and its file system journals names
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- atomic writes --------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> str:
    """Write a file so that at every moment `path` has its old content or its new one.

    If the write fails (a full disk), the old content stays and the temporary file is removed.
    Returns the sha256 of the content. Raises OSError with the name `path`.
    """
    return write_pieces(path, [data])


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """`write_atomic` of content that comes in pieces, so that memory never holds all of it.

    Small pieces are joined, so that few calls write many of them. Each call has its own temporary
    file, so if two processes write the same file at once, the last to finish wins.
    """
    # Cut to 200 bytes, because names may have 255.
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
        if isinstance(error, OSError):  # with the name that the user knows
            error.filename, error.filename2 = str(path), None
        raise
    return digest.hexdigest()


def _blocks(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The pieces in at least one block of about `PIECE` bytes: small ones joined, large ones
    cut.
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
    """Remove the files of writes that were killed; call it while holding the folder's lock."""
    for path in folder.glob(TEMPORARY_PREFIX + "*"):
        remove(path)


# --- locks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock_folder(folder: Path, *, wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the folder's lock inside the ``with``; the system releases it when this process ends.

    Args:
        folder: an existing folder.
        wait: called every tenth of a second until the lock is free; None raises `LockedError`
            instead of waiting.

    Yields whether the lock is held, because Windows and some network file systems have no locks.
    Makes no file that could stay behind. Raises OSError for a folder that cannot be opened.
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
    """The hash, to be continued, of the first `length` bytes of a file (None: of all), or of all if
    it is shorter.
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

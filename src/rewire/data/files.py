"""Files that are whole or absent: checksums and atomic writes.

The five functions that touch the disk for a write stand alone and by name, so that tests can crash a run at
every single one of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import BinaryIO

# Files of this name are writes that never finished; nothing ever reads them.
TEMPORARY_PREFIX = ".unfinished-"


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


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that at every moment `path` holds its old content or its new one, never a part.

    A write that fails (a full disk) leaves the old content and removes the temporary file.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    try:
        with open(temporary, "wb") as file:
            write_bytes(file, data)
            sync_file(file)
        rename(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        if isinstance(error, OSError):  # what the user asked for, not the temporary name or none at all
            error.filename, error.filename2 = str(path), None
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what writes that were killed left behind."""
    for path in folder.glob(TEMPORARY_PREFIX + "*"):
        remove(path)


def sha256_bytes(data: bytes) -> str:
    """Checksum of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Checksum of a file, in hex, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()

"""Files of public data sets: found in a folder of the user's, or downloaded; checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rewire.app.data.download import Progress, download, is_whole
from rewire.app.errors import DataError
from rewire.storage.files import sha256_file

__all__ = ["PublicFile", "cache_folder", "fetch", "find"]


@dataclass(frozen=True)
class PublicFile:
    """A file, and where the public has it."""

    name: str
    size: int
    sha256: str
    url: str


def cache_folder() -> Path:
    """Where downloads are kept: $REWIRE_DATA, else $XDG_CACHE_HOME/rewire, else ~/.cache/rewire."""
    if folder := os.environ.get("REWIRE_DATA"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "rewire"
    return Path.home() / ".cache" / "rewire"


def find(data_dir: Path, dataset: str, name: str) -> Path | None:
    """A file in ``data_dir/dataset`` or ``data_dir`` itself."""
    places = (data_dir / dataset / name, data_dir / name)
    return next((path for path in places if path.is_file()), None)


def fetch(
    file: PublicFile,
    dataset: str,
    data_dir: Path | None,
    mirror: str | None,
    progress: Progress | None,
) -> Path:
    """The path of a file whose checksum is right. Raises DataError."""
    if data_dir is not None:
        path = find(data_dir, dataset, file.name)
        if path is None:
            raise DataError(
                f"--data-dir {data_dir}: {file.name} not found there, nor in a subfolder {dataset}"
            )
        if not is_whole(path, sha256=file.sha256, size=file.size):
            raise DataError(
                f"{path}: sha256 {sha256_file(path)}, expected {file.sha256}; replace the file, or "
                "leave out --data-dir to have it downloaded"
            )
        return path
    path = cache_folder() / dataset / file.name
    if not is_whole(path, sha256=file.sha256, size=file.size):
        download(
            f"{mirror.rstrip('/')}/{file.name}" if mirror else file.url,
            path,
            sha256=file.sha256,
            size=file.size,
            help_line=f"without a network give --data-dir FOLDER with {file.name}; another source "
            "is chosen with --mirror URL",
            progress=progress,
        )
    return path

"""Downloads that continue where they stopped, by one process at a time, and are checked."""

from __future__ import annotations

import contextlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from rewire.app.errors import DataError
from rewire.storage.files import (
    lock_folder,
    remove,
    rename,
    sha256_file,
    sync_file,
    sync_folder,
    write_bytes,
)

Progress = Callable[[str, int, int], None]  # (file name, bytes so far, bytes in all)

PIECE = 1 << 16
# attempts after a connection broke, as long as each brings something
ATTEMPTS = 4


class _BrokenOffError(Exception):
    """The connection ended before the file did."""


def _continues_at(response: http.client.HTTPResponse) -> int:
    """The offset at which a response's bytes belong: 0 from a server that ignores Range."""
    content_range = response.headers.get("Content-Range", "")  # "bytes 100-199/200"
    if response.status != 206 or not content_range.startswith("bytes "):
        return 0
    first = content_range.removeprefix("bytes ").split("-")[0]
    return int(first) if first.isdigit() else 0


def _transfer(
    url: str, part: Path, size: int, timeout: float, progress: Progress | None, name: str
) -> None:
    """One attempt: fetch what `part` lacks of the file."""
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        remove(part)
        have = 0
    if have == size:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "rewire"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=timeout) as response:
        start = _continues_at(response)
        if start not in (0, have):
            raise DataError(
                f"{url}: asked for bytes from {have} on, the server sent them from {start} on"
            )
        with open(part, "ab" if start else "wb") as file:
            done = start
            while done < size:
                try:
                    piece = response.read(min(PIECE, size - done))
                except (http.client.HTTPException, OSError) as error:
                    raise _BrokenOffError(str(error) or type(error).__name__) from error
                if not piece:
                    raise _BrokenOffError("the server closed the connection")
                write_bytes(file, piece)
                done += len(piece)
                if progress is not None:
                    progress(name, done, size)
            sync_file(file)


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(error).__name__


def download(
    url: str,
    target: Path,
    *,
    sha256: str,
    size: int,
    help_line: str,
    timeout: float = 30.0,
    progress: Progress | None = None,
) -> None:
    """Fetch `url` into `target`.

    Bytes gather in `<target>.part`, which survives an interruption and is continued by the next
    call; the file gets its name only when its checksum is right. The folder is locked meanwhile: of
    several processes that want the file one fetches it, and the others wait and find it. Where
    there are no locks (Windows) each gathers bytes under a name of its own, which no other call
    continues. `help_line` ends every error message: what else one can do.
    """
    part = target.with_name(target.name + ".part")

    def wait() -> None:
        if progress is not None:
            with contextlib.suppress(OSError):
                progress(target.name, part.stat().st_size, size)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(target.parent, wait=wait) as held:
            # by another process, while this one waited
            if is_whole(target, sha256=sha256, size=size):
                return
            own = part if held else part.with_name(f"{part.name}-{os.getpid()}")
            _fetch(url, target, own, sha256, size, help_line, timeout, progress)
    except OSError as error:
        raise DataError(
            f"cannot write {part}: {os.strerror(error.errno or 0)}; {help_line}"
        ) from None


def is_whole(path: Path, *, sha256: str, size: int) -> bool:
    """Whether the file is there and is the right one; nothing of another size is read."""
    try:
        return path.is_file() and path.stat().st_size == size and sha256_file(path) == sha256
    except OSError:
        return False


def _fetch(
    url: str,
    target: Path,
    part: Path,
    sha256: str,
    size: int,
    help_line: str,
    timeout: float,
    progress: Progress | None,
) -> None:
    try:
        for attempt in range(1, ATTEMPTS + 1):
            before = part.stat().st_size if part.exists() else 0
            try:
                _transfer(url, part, size, timeout, progress, target.name)
                break
            except _BrokenOffError as error:
                have = part.stat().st_size if part.exists() else 0
                if attempt == ATTEMPTS or have <= before:
                    raise DataError(
                        f"{url}: broke off after {have} of {size} bytes ({error}); "
                        f"run the command again to continue, or {help_line}"
                    ) from None
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # what lies there is not the beginning of this file
            remove(part)
        raise DataError(
            f"{url}: the server answered {error.code} {error.reason}; {help_line}"
        ) from None
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
    ) as error:
        raise DataError(f"{url}: cannot be reached ({_reason(error)}); {help_line}") from None
    except ValueError:
        raise DataError(f"{url!r} is not a URL that can be fetched; {help_line}") from None
    found = sha256_file(part)
    if found != sha256:
        remove(part)
        raise DataError(
            f"{url}: wrong content, sha256 {found}, expected {sha256}; it was deleted; {help_line}"
        )
    rename(part, target)
    sync_folder(target.parent)

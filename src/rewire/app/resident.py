"""The memory that this process has, as the system counts it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

from rewire.app.errors import NotAvailable

__all__ = ["Memory", "can_measure", "trim"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory:
    """Resident memory of this process in bytes, without the pages of files.

    Those are the code of libraries, which the system drops and reads again at will: 40 MB of it
    would be 4 bytes for each of ten million connections.
    """

    @staticmethod
    def _read(key: str) -> int:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
        raise NotAvailable(f"this system's /proc does not tell {key}")

    def now(self) -> int:
        """Resident now."""
        return self._read("RssAnon")

    def peak(self) -> int:
        """Highest since `reset`. Reset shortly before: the pages of files are subtracted."""
        return self._read("VmHWM") - self._read("RssFile")

    def total(self) -> int:
        """Highest since `reset`, with everything."""
        return self._read("VmHWM")

    def reset(self) -> None:
        """Start the high-water mark at what is resident now."""
        _CLEAR.write_text("5")

    def peak_of(self, call: Callable[[], object], base: int) -> int:
        """Highest memory over ``base`` during a call, after freed memory was given back."""
        trim()
        self.reset()
        call()
        return self.peak() - base


def trim() -> None:
    """Give freed memory back to the system, where the C library can be told to."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def can_measure() -> bool:
    """Whether this system has what `Memory` reads."""
    return _STATUS.exists() and _CLEAR.exists()

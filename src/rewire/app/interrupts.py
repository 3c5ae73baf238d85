"""Signals that ask a process to end: the first is obeyed, and those that follow meanwhile are
ignored.

Only the standard library is imported, so that a command is guarded before anything is loaded.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import NoReturn

__all__ = ["guard", "interrupt", "is_late", "leave", "stay"]

#: Seconds a process may take to end after it was asked to; a signal after that ends it at once.
PATIENCE = 1.0

_leaving_since: float | None = None


def stay() -> None:
    """Begin something: the next signal interrupts it."""
    global _leaving_since
    _leaving_since = None


def leave() -> None:
    """From now on the process only prints its last line, which no signal may cut off."""
    global _leaving_since
    if _leaving_since is None:
        _leaving_since = time.monotonic()


def is_late(number: int) -> bool:
    """Whether the process is about to end anyway, so that signal ``number`` can be passed over.

    If it takes too long, it is ended here. That is safe: files are whole at every moment.
    """
    if _leaving_since is None:
        return False
    if time.monotonic() - _leaving_since > PATIENCE:
        os._exit(128 + number)
    return True


def interrupt() -> NoReturn:
    """Raise KeyboardInterrupt, and ignore the signals that follow."""
    leave()
    raise KeyboardInterrupt


def _handle(number: int, _frame: FrameType | None) -> None:
    if not is_late(number):
        interrupt()


def guard() -> None:
    """Let the first Ctrl-C raise KeyboardInterrupt, and ignore the later ones."""
    signal.signal(signal.SIGINT, _handle)

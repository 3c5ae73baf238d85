"""Ctrl-C and SIGTERM, kept until the run is at a point where it can be left."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType
from typing import Any

from rewire.app import interrupts


class Signals:
    """While training, a signal asks to stop at the next step; a second one, or one before, stops at
    once. Those that come while the process prints how it ended are ignored.

    A context manager, which restores the former handlers.
    """

    def __init__(self) -> None:
        self.received, self.training = 0, False
        self.former: list[tuple[int, Any]] = []

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            # not in the main thread: whoever runs us handles signals
            with contextlib.suppress(ValueError):
                self.former.append((number, signal.signal(number, self._handle)))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former:
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if interrupts.is_late(number):
            return
        again, self.received = self.received, number
        if again or not self.training:
            interrupts.interrupt()

    def __call__(self) -> int:
        """The signal that arrived, or 0."""
        return self.received

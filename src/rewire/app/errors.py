"""The errors that the application shows its user as one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user asked for cannot be done; the message is one line that says what can.

    Attributes:
        code: the exit code of the command.
    """

    code = 2


class TrainError(UserError):
    """A run that cannot be started, resumed or continued."""


class DataError(UserError):
    """Data that cannot be had or cannot be trusted."""


class RunFileError(UserError):
    """Files of a run that cannot be read or do not belong together; the message names the file."""


class ReportError(UserError):
    """A folder of which no report can be made."""


class BenchError(UserError):
    """A measurement that cannot be made."""


class StudyError(UserError):
    """A study that cannot be planned, opened or continued."""


class StoppedError(UserError):
    """A signal asked the run to stop, and it has left a whole checkpoint behind."""

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.code = 128 + signal
        self.step = step


class NotAvailable(Exception):
    """Something cannot be measured here: an operating system without /proc, say."""


def did_you_mean(given: str, allowed: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint for a mistyped name, or nothing; ``cutoff`` as in `difflib.get_close_matches`."""
    close = difflib.get_close_matches(given, list(allowed), 1, cutoff)
    return f" (did you mean {close[0]!r}?)" if close else ""

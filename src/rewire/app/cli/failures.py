"""What can go wrong in a command, in one line that says what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from rewire.app import interrupts, memory
from rewire.app.errors import StoppedError, UserError
from rewire.app.run_files import COMMIT

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class CommandError(UserError):
    """One line for stderr, and the exit code."""

    def __init__(self, line: str, code: int = 2) -> None:
        super().__init__(line)
        self.code = code


def explained(error: BaseException, received: int = signal.SIGINT) -> UserError | None:
    """The error that the user is shown in place of ``error``; None for a fault of the program.

    ``received`` is the signal that a KeyboardInterrupt stands for.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return CommandError("stopped", 128 + received)
    if memory.is_exhausted(error):
        return CommandError("out of memory")
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        advice = "; make room" if error.errno in _FULL else ""
        return CommandError(f"cannot read or write{where}: {error.strerror or error}{advice}")
    return None


@contextlib.contextmanager
def resumable(run_dir: Callable[[], Path | None], received: Callable[[], int]) -> Iterator[None]:
    """While a run is trained: say how to go on with it after whatever stops it.

    ``run_dir`` gives its folder, once it has one, and ``received`` the signal that came, or 0.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our output went away, no file of the run
    except BaseException as error:
        if isinstance(error, StoppedError | KeyboardInterrupt):
            interrupts.leave()
        elif isinstance(error, UserError):
            raise
        line = explained(error, received() or signal.SIGINT)
        if line is None:
            raise
        folder = run_dir()
        # os.path.exists, unlike Path.exists, raises no error of its own
        if folder is None or not os.path.exists(folder / COMMIT):
            raise line from None
        command = f"rewire train --resume --run-dir {shlex.quote(str(folder))}"
        raise CommandError(
            f"{line}; the last checkpoint is whole, go on with: {command}", line.code
        ) from None

"""The command `rewire`. Whatever error a user can cause is one line on stderr."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from rewire.app import interrupts
from rewire.app.cli.bench_command import bench
from rewire.app.cli.compare_command import compare, recipes
from rewire.app.cli.data_command import data
from rewire.app.cli.export_command import export
from rewire.app.cli.failures import CommandError, explained
from rewire.app.cli.import_command import import_weights
from rewire.app.cli.methods_command import methods
from rewire.app.cli.train_command import train
from rewire.app.memory import is_exhausted

app = typer.Typer(
    name="rewire",
    help="Train deep networks under a connection budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(compare)
app.command()(recipes)
app.command()(methods)
app.command()(data)


@app.command()
def report(
    run_dir: Annotated[
        Path, typer.Argument(help="Folder of a run, finished or not.", show_default=False)
    ],
) -> None:
    """Make report.html of a run again."""
    from rewire.app import report

    try:
        print(report.write(run_dir))
    # content that no check foresaw
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        if is_exhausted(error):
            raise
        raise CommandError(f"a file in {run_dir} is damaged or of another run: {error!r}") from None


app.command()(export)
app.command(name="import")(import_weights)
app.command()(bench)


def _version(wanted: bool) -> None:
    if wanted:
        import torch

        from rewire import _native
        from rewire._version import __version__

        print(f"rewire {__version__}\ntorch {torch.__version__}\nkernels: {_native.describe()}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Versions, and which kernels are in use.",
            callback=_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Train deep networks under a connection budget."""


# From some version on, Typer brings its own copy of click: its public names lead to the right
# classes.
UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    interrupts.stay()
    for stream in (sys.stdout, sys.stderr):  # the name of a folder may be no valid UTF-8
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=list(arguments), prog_name="rewire", standalone_mode=False)
        sys.stdout.flush()
        if code == 128 + signal.SIGINT:  # what some versions of Typer make of KeyboardInterrupt
            raise KeyboardInterrupt
    except UsageError as error:
        usage: Any = error
        # Without a command Typer has printed the help, and the message is empty.
        if message := " ".join(str(usage.format_message()).split()):
            context = getattr(error, "ctx", None)
            _say(f"{message} See {context.command_path if context else 'rewire'} --help.")
        return CommandError.code
    except BrokenPipeError:  # the reader of our output went away: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt | typer.Abort):
            interrupts.leave()
        line = explained(error)
        if line is None:
            raise
        _say(str(line))
        return line.code
    return code if isinstance(code, int) else 0


def _say(line: str) -> None:
    """Print the line of an error; names of files may hold line ends and control characters."""
    print(
        "error:",
        re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", lambda c: repr(c[0])[1:-1], line),
        file=sys.stderr,
    )

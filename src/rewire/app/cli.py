"""The command line. Every error a user can cause is one line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from rewire.app import interrupts, memory
from rewire.app.bench import entry as bench
from rewire.app.train.config import OPTIMIZERS, TrainConfig, read_number, read_numbers
from rewire.app.train.errors import StoppedError, TrainError
from rewire.app.train.signals import Signals

if TYPE_CHECKING:  # torch is loaded by the commands that need it, so that --help is quick
    from rewire.app.train.run_dir import RunDir

USAGE = 2
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

app = typer.Typer(
    name="rewire",
    help="Train deep networks under a connection budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class CliError(Exception):
    """One line for stderr, and the exit code."""

    def __init__(self, line: str, code: int = USAGE) -> None:
        super().__init__(line)
        self.code = code


def _resume_command(run_dir: Path) -> str:
    return f"rewire train --resume --run-dir {shlex.quote(str(run_dir))}"


@contextlib.contextmanager
def _reporting(signals: Signals, run_dir: Callable[[], Path | None]) -> Iterator[None]:
    """Turn what can go wrong into a `CliError` that says what to do."""
    from rewire.app.data import DataError
    from rewire.app.report.read import ReportError
    from rewire.app.run_files import COMMIT

    def how_to_go_on() -> str:
        folder = run_dir()
        # os.path.exists, unlike Path.exists, has no error of its own.
        if folder is None or not os.path.exists(folder / COMMIT):
            return ""
        return f"; the last checkpoint is whole, go on with: {_resume_command(folder)}"

    try:
        yield
    except (DataError, TrainError, ReportError) as error:
        raise CliError(str(error)) from None
    except StoppedError as error:
        interrupts.leave()
        raise CliError(
            f"stopped after step {error.step}{how_to_go_on()}", 128 + error.signal
        ) from None
    except KeyboardInterrupt:
        raise CliError(
            f"stopped{how_to_go_on()}", 128 + (signals.received or signal.SIGINT)
        ) from None
    except BrokenPipeError:
        raise  # not a file of the run: `run` deals with it
    except Exception as error:
        if memory.is_exhausted(error):
            raise CliError(f"out of memory{how_to_go_on()}") from None
        if not isinstance(error, OSError):
            raise
        room = "make room" if error.errno in FULL else ""
        where = f" {error.filename}" if error.filename else ""
        line = f"cannot read or write{where}: {error.strerror or error}"
        raise CliError("; ".join(filter(None, [line, room])) + how_to_go_on()) from None


def _default(field: str) -> str:
    value = TrainConfig.model_fields[field].default
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _option(
    panel: str, metavar: str, text: str, *names: str, field: str = "", default: str = ""
) -> Any:
    """An option whose default, for the eyes only, is the field's; not given it stays None, unlike
    its default.
    """
    if field or default:
        text += rf" \[default: {default or _default(field)}]"
    return typer.Option(
        *names, help=text, metavar=metavar or None, rich_help_panel=panel, show_default=False
    )


DATA, NETWORK, METHOD, TRAINING, RUN = "Data", "Network and budget", "Method", "Training", "Run"


@app.command()
def train(
    data: Annotated[
        str | None,
        _option(
            DATA, "NAME", "digits (part of the package), mnist or fashion-mnist.", field="data"
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        _option(
            DATA,
            "FOLDER",
            "The four *-ubyte.gz files, or a subfolder mnist or fashion-mnist with them.",
        ),
    ] = None,
    mirror: Annotated[
        str | None, _option(DATA, "URL", "Folder to download from, where there is no --data-dir.")
    ] = None,
    validation: Annotated[
        str | None,
        _option(
            DATA, "SHARE", "Training samples held out to report on; 0: none.", field="validation"
        ),
    ] = None,
    hidden: Annotated[
        str | None,
        _option(NETWORK, "SIZES", "Hidden layers; none: a linear model.", field="hidden"),
    ] = None,
    bias: Annotated[bool | None, _option(NETWORK, "", "Biases.", "--bias/--no-bias")] = None,
    density: Annotated[
        str | None,
        _option(
            NETWORK,
            "SHARES",
            "Allowed of possible connections; one number, or one a layer.",
            default="0.1",
        ),
    ] = None,
    connections: Annotated[
        str | None,
        _option(NETWORK, "NUMBER", "Allowed connections of the network, instead of --density."),
    ] = None,
    distribution: Annotated[
        str | None,
        _option(NETWORK, "NAME", "How layers share one budget: erk, er or uniform.", default="erk"),
    ] = None,
    start_density: Annotated[
        str | None,
        _option(
            NETWORK,
            "SHARE",
            "Where methods that come down to their budget start.",
            default="1, mostly",
        ),
    ] = None,
    fan_in: Annotated[
        str | None, _option(NETWORK, "NUMBER", "Most connections of one output of a layer.")
    ] = None,
    fan_out: Annotated[
        str | None, _option(NETWORK, "NUMBER", "Most connections of one input of a layer.")
    ] = None,
    block: Annotated[
        str | None,
        _option(
            NETWORK,
            "NUMBERS",
            "64,32,99: at most 99 connections in each block of 64 outputs x 32 inputs.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        _option(
            NETWORK,
            "RULE",
            "First values: auto keeps the dense network's signals; or dense, sparse.",
            field="init",
        ),
    ] = None,
    method: Annotated[
        str | None,
        _option(METHOD, "NAME", "One of those that 'rewire methods' lists.", field="method"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        _option(METHOD, "NAME=VALUE", "A parameter of the method; may be repeated.", "--set"),
    ] = None,
    epochs: Annotated[
        str | None, _option(TRAINING, "NUMBER", "Passes over the training data.", field="epochs")
    ] = None,
    batch_size: Annotated[
        str | None, _option(TRAINING, "NUMBER", "Samples in a step.", field="batch_size")
    ] = None,
    optimizer: Annotated[
        str | None,
        _option(TRAINING, "NAME", f"One of {', '.join(OPTIMIZERS)}.", default="adam, mostly"),
    ] = None,
    lr: Annotated[
        str | None, _option(TRAINING, "NUMBER", "Learning rate.", default="0.01 for adam, mostly")
    ] = None,
    lr_decay: Annotated[
        str | None,
        _option(
            TRAINING, "FACTOR", "Learning rate x this after an epoch.", default="a cosine to 0"
        ),
    ] = None,
    momentum: Annotated[
        str | None, _option(TRAINING, "NUMBER", "Momentum of sgd and rmsprop.", field="momentum")
    ] = None,
    weight_decay: Annotated[
        str | None, _option(TRAINING, "NUMBER", "Some methods refuse it.", field="weight_decay")
    ] = None,
    seed: Annotated[
        str | None, _option(TRAINING, "NUMBER", "Decides all random numbers.", field="seed")
    ] = None,
    run_dir: Annotated[
        Path | None,
        _option(RUN, "FOLDER", "Where the results go.", default="runs/DATA-METHOD-SEED, a new one"),
    ] = None,
    resume: Annotated[
        bool,
        _option(
            RUN, "", "Go on with the run in --run-dir, bit-exactly, with its options.", "--resume"
        ),
    ] = False,
    overwrite: Annotated[
        bool, _option(RUN, "", "Replace the run in --run-dir.", "--overwrite")
    ] = False,
    checkpoint_every: Annotated[
        str | None,
        _option(
            RUN, "STEPS", "Save within epochs too; 0: only at their ends.", field="checkpoint_every"
        ),
    ] = None,
    threads: Annotated[
        str | None, _option(RUN, "NUMBER", "CPU threads.", default="as many as are worth it")
    ] = None,
    quiet: Annotated[bool, _option(RUN, "", "Print errors only.", "--quiet", "-q")] = False,
) -> None:
    """Train a sparse network; leaves checkpoint, metrics, result and report in a run directory."""
    given = {
        "data": data,
        "data_dir": str(data_dir.absolute()) if data_dir else None,
        "mirror": mirror,
        "validation": read_number("--validation", validation, float),
        "hidden": read_numbers("--hidden", hidden, int, "sizes such as 300,100"),
        "bias": bias,
        "density": read_numbers(
            "--density", density, float, "a number such as 0.1, or one a layer: 0.01,0.03,0.3"
        ),
        "connections": read_number("--connections", connections, int),
        "distribution": distribution,
        "fan_in": read_number("--fan-in", fan_in, int),
        "fan_out": read_number("--fan-out", fan_out, int),
        "block": read_numbers("--block", block, int, "three numbers such as 64,64,128"),
        "start_density": read_number("--start-density", start_density, float),
        "init": init,
        "method": method,
        "epochs": read_number("--epochs", epochs, int),
        "batch_size": read_number("--batch-size", batch_size, int),
        "optimizer": optimizer,
        "lr": read_number("--lr", lr, float),
        "lr_decay": read_number("--lr-decay", lr_decay, float),
        "momentum": read_number("--momentum", momentum, float),
        "weight_decay": read_number("--weight-decay", weight_decay, float),
        "seed": read_number("--seed", seed, int),
        "checkpoint_every": read_number("--checkpoint-every", checkpoint_every, int),
        "threads": read_number("--threads", threads, int),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if resume and overwrite:
        raise CliError("--resume goes on with a run, --overwrite replaces it: give one of them")
    if resume and run_dir is None:
        raise CliError("--resume: give the run with --run-dir FOLDER")
    folder = run_dir
    with Signals() as signals, _reporting(signals, lambda: folder):
        from rewire.app.train import command
        from rewire.app.train.run_dir import RunDir

        if resume:
            assert folder is not None  # refused above
            place = RunDir(folder)
            config = command.config_to_resume(place, given, set_)
            if place.is_finished():
                if not quiet:
                    print(f"the run in {folder} is finished")
                _show_result(place, quiet)
                return
        else:
            config = command.config_to_start(given, set_)
            folder = folder or command.fresh_folder(config)
            place = RunDir(folder)
        with place.lock():  # until the report is written
            command.execute(config, place, signals, resume=resume, overwrite=overwrite, quiet=quiet)
            signals.training = False
            _show_result(place, quiet)


def _show_result(place: RunDir, quiet: bool) -> None:
    """Make the report, if a kill prevented it or it is new, and print how the run ended."""
    from rewire.app import report
    from rewire.app.train.display import change_line
    from rewire.app.train.run_dir import REPORT

    result = place.read_result()
    page = place.path / REPORT
    if not page.exists():
        report.write(place.path)
    if quiet:
        return
    print(f"test accuracy  {result['test_accuracy']:.2%}  (loss {result['test_loss']:.4f})")
    print(
        f"connections    {result['connections']:,} of {result['possible_connections']:,} "
        f"(density {result['density']:.2%})"
    )
    if (change := change_line(result)) is not None:
        print(f"before, after  {change}")
    print(f"seconds        {result['seconds']:.1f}")
    print(f"report         {page}")


#: Columns from which the table of methods has room for papers and guarantees.
WHOLE_TABLE = 140


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show one method with its parameters.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with every parameter.")
    ] = False,
) -> None:
    """List the methods: paper, what they do, what they guarantee, memory."""
    from rewire import methods as registry

    if name is not None and name not in registry.available():
        from rewire.app.train.config import check_name
        from rewire.app.train.errors import TrainError

        try:
            check_name("methods", name, registry.available())
        except TrainError as error:
            raise CliError(str(error)) from None
    entries = [registry.info(n) for n in registry.available() if name in (None, n)]
    if as_json:
        rows = [
            {
                "name": entry.name,
                "paper": entry.paper,
                "summary": entry.summary,
                "keeps_budget": entry.keeps_budget,
                "guarantees": list(entry.guarantees),
                "memory": entry.memory,
                "start_density": entry.start_density,
                "limits": list(entry.limits),
                "parameters": {
                    name: {"default": _plain(parameter.default), "help": parameter.help}
                    for name, parameter in entry.parameters().items()
                },
            }
            for entry in entries
        ]
        print(json.dumps(rows, indent=2))
        return
    if name is not None:
        (entry,) = entries
        print(
            f"{entry.name}: {entry.summary}\n{entry.paper}\nguarantees: "
            f"{'; '.join(entry.guarantees)}"
        )
        if entry.start_density is not None:
            print(f"starts: at density {entry.start_density:g}, and comes down to its budget")
        if entry.cls.starts_dense:
            print("starts: from an ordinary dense model")
        if entry.limits:
            print(f"keeps limits on: {', '.join(entry.limits)}")
        print(f"memory: {entry.memory}\nparameters (--set name=value):")
        for parameter in entry.parameters().values():
            print(f"  {parameter.name} = {_plain(parameter.default)}\n      {parameter.help}")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    whole = console.width >= WHOLE_TABLE
    names = ("name", "memory", "what it does", *(("paper", "guarantees") if whole else ()))
    table = Table(*names, box=box.SIMPLE_HEAD, show_lines=whole)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for entry in entries:
        more = (entry.paper, "; ".join(entry.guarantees)) if whole else ()
        table.add_row(entry.name, entry.memory, entry.summary, *more)
    console.print(table)
    if not whole:
        print("rewire methods NAME shows one with its paper, guarantees and parameters")


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


@app.command("report")
def report_command(
    run_dir: Annotated[
        Path, typer.Argument(help="Folder of a run, finished or not.", show_default=False)
    ],
) -> None:
    """Make report.html of a run anew."""
    from rewire.app import report

    try:
        print(report.write(run_dir))
    except report.ReportError as error:
        raise CliError(str(error)) from None
    # files that say what no run's files say
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        if memory.is_exhausted(error):
            raise
        raise CliError(f"a file in {run_dir} is damaged or of another run: {error!r}") from None
    except OSError as error:
        if memory.is_exhausted(error):
            raise
        raise CliError(f"cannot read or write {error.filename}: {error.strerror}") from None


app.command("bench")(bench.bench)


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


# typer brings its own copy of click from some version on: its public names lead to the right
# classes.
UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    interrupts.stay()
    for stream in (sys.stdout, sys.stderr):  # the name of a folder may be no text
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=list(arguments), prog_name="rewire", standalone_mode=False)
        sys.stdout.flush()
        if code == 128 + signal.SIGINT:  # what some versions of typer make of KeyboardInterrupt
            raise KeyboardInterrupt
    except CliError as error:
        _say(str(error))
        return error.code
    except (TrainError, bench.BenchError) as error:
        _say(str(error))
        return USAGE
    except UsageError as error:
        usage: Any = error
        message = " ".join(str(usage.format_message()).split())
        if not message:  # without a command the help was printed, which says all
            return USAGE
        _say(f"{message} See {_help_of(error)}.")
        return USAGE
    except (KeyboardInterrupt, typer.Abort):
        interrupts.leave()
        _say("stopped")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output went away: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not memory.is_exhausted(error):
            raise
        _say("out of memory")
        return USAGE
    return code if isinstance(code, int) else 0


def _say(line: str) -> None:
    """The one line of an error: names of files and folders may hold line ends and other control
    characters.
    """
    print(
        "error:",
        re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", lambda c: repr(c[0])[1:-1], line),
        file=sys.stderr,
    )


def _help_of(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context else 'rewire'} --help"

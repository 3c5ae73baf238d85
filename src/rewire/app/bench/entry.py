"""The command `rewire bench`: its options. What they start is loaded only then, so that --help is
quick.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from rewire.app.bench.errors import BenchError

__all__ = ["BenchError", "bench", "parse_density", "parse_layer", "parse_shape"]


def parse_layer(text: str) -> tuple[int, int]:
    """ "4096x1024" is a weight of 4096 outputs and 1024 inputs. Raises `BenchError`."""
    found = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", text)
    sizes = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(sizes) < 1:
        raise BenchError(
            f"--layer: given {text!r}, allowed is OUTPUTSxINPUTS such as 4096x1024, both at least 1"
        )
    return sizes


def parse_shape(text: str) -> tuple[int, ...]:
    """ "3x224x224" is the shape of one sample. Raises `BenchError`."""
    parts = text.lower().split("x")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise BenchError(
            f"--input: given {text!r}, allowed is the shape of one sample such as 784 or 3x224x224"
        )
    return tuple(int(part) for part in parts)


def parse_density(text: str) -> float:
    """A share in (0, 1]. Raises `BenchError`."""
    try:
        density = float(text)
    except ValueError:
        density = 0.0
    if not 0.0 < density <= 1.0:
        raise BenchError(f"--density: given {text!r}, allowed is a number above 0 and up to 1")
    return density


def _count(option: str, text: str, most: int | None = None) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1 or (most is not None and count > most):
        upper = "" if most is None else f" to {most}"
        raise BenchError(f"{option}: given {text!r}, allowed is a whole number from 1{upper}")
    return count


WHAT, CASE, RUN = "What to measure", "The layer or model", "Run"


def _option(panel: str, metavar: str | None, text: str, *names: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        *names, help=text, metavar=metavar, rich_help_panel=panel, show_default=False
    )
    return option


def bench(
    bars: Annotated[
        str | None,
        _option(WHAT, "NAMES", "Only these bars, such as p1,p5; grid and wide may be among them."),
    ] = None,
    layer: Annotated[
        str | None,
        _option(WHAT, "OUTPUTSxINPUTS", "Only this linear layer, every way to compute it."),
    ] = None,
    model: Annotated[
        str | None,
        _option(
            WHAT,
            "NAME",
            "Only the layers of mlp, resnet18 or path.to.module:callable: sparse or dense?",
        ),
    ] = None,
    density: Annotated[
        str | None,
        _option(
            CASE,
            "SHARE",
            r"Of the connections. "
            r"\[default: 0.1]",
        ),
    ] = None,
    batch: Annotated[
        str | None, _option(CASE, "NUMBER", r"Samples in a batch. \[default: 128; for resnet18 32]")
    ] = None,
    input_shape: Annotated[
        str | None,
        _option(CASE, "SHAPE", "Of one sample of the model, such as 3x224x224.", "--input"),
    ] = None,
    memory: Annotated[
        bool,
        _option(CASE, None, "Also the memory of each way, in a process of its own.", "--memory"),
    ] = False,
    threads: Annotated[
        str | None,
        _option(
            RUN,
            "NUMBER",
            r"CPU threads. \[default: as many as "
            r"torch takes]",
        ),
    ] = None,
    cpu_time: Annotated[
        bool,
        _option(
            RUN,
            None,
            "One thread and its CPU seconds: a diagnosis on a busy machine, no verdict.",
            "--cpu-time",
        ),
    ] = False,
    quick: Annotated[
        bool, _option(RUN, None, "Fewer rounds, smaller problems; for a first look.", "--quick")
    ] = False,
    out: Annotated[
        Path | None,
        _option(RUN, "FOLDER", r"Where bench.json and bench.html go. \[default: runs/bench]"),
    ] = None,
) -> None:
    """Measure speed and memory here, beside dense layers and other sparse ones; leaves figures and
    a picture.

    Without further options: the grid of layers, the bars P1 to P12 and the wide network, in some
    minutes. Other programs disturb: the share of the machine they take is printed.
    """
    if sum(x is not None for x in (bars, layer, model)) > 1:
        raise BenchError("--bars, --layer and --model are different runs: give one of them")
    for option, given, needs in (
        ("--density", density, "--layer or --model"),
        ("--batch", batch, "--layer or --model"),
    ):
        if given is not None and layer is None and model is None:
            raise BenchError(f"{option} belongs to {needs}: the bars have their own")
    if input_shape is not None and model is None:
        raise BenchError("--input belongs to --model")
    if memory and layer is None:
        raise BenchError("--memory belongs to --layer: the bars p9 to p11 measure memory anyway")
    if cpu_time and threads not in (None, "1"):
        raise BenchError("--cpu-time counts one thread: leave --threads out")
    size = None if layer is None else parse_layer(layer)
    share = 0.1 if density is None else parse_density(density)
    samples = None if batch is None else _count("--batch", batch)
    shape = None if input_shape is None else parse_shape(input_shape)
    from rewire.app.bench import run as command

    place = out or Path("runs") / "bench"
    names = None if bars is None else bars.split(",")
    number = None if threads is None else _count("--threads", threads, command.most_threads())
    try:
        run = command.Run(quick=quick, threads=number, cpu_time=cpu_time, out=place, names=names)
        if size is not None:
            run.layer(size, share, samples or 128, memory)
        elif model is not None:
            run.model(model, shape, share, samples or (32 if model == "resnet18" else 128))
        else:
            run.everything()
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise BenchError(f"cannot write{where}: {error.strerror or error}") from None

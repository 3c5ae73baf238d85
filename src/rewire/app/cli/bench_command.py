"""The command `rewire bench`. What it starts is loaded only then, so that --help is quick."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from rewire.app.cli.options import described
from rewire.app.cores import cores
from rewire.app.errors import BenchError

__all__ = ["bench", "parse_density", "parse_layer", "parse_shape"]


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


def _count(option: str, most: Callable[[], int] | None = None) -> Callable[[str], int]:
    """The parser of a whole number from 1 to ``most``."""

    def parse(text: str) -> int:
        upper = None if most is None else most()
        try:
            count = int(text)
        except ValueError:
            count = 0
        if count < 1 or (upper is not None and count > upper):
            end = "" if upper is None else f" to {upper}"
            raise BenchError(f"{option}: given {text!r}, allowed is a whole number from 1{end}")
        return count

    return parse


WHAT, CASE, RUN = "What to measure", "The layer or model", "Run"


def bench(
    targets: Annotated[
        str | None,
        described(
            WHAT,
            "NAMES",
            "Only these performance targets, such as p1,p5; grid and wide may be among them.",
        ),
    ] = None,
    layer: Annotated[
        Any,
        described(
            WHAT,
            "OUTPUTSxINPUTS",
            "Only this linear layer, every way to compute it.",
            parser=parse_layer,
        ),
    ] = None,
    model: Annotated[
        str | None,
        described(
            WHAT, "NAME", "Only the layers of mlp, resnet18, gpt-40m or path.to.module:callable."
        ),
    ] = None,
    density: Annotated[
        Any,
        described(
            CASE,
            "SHARE",
            r"Share of the connections that is active. \[default: 0.1]",
            parser=parse_density,
        ),
    ] = None,
    batch: Annotated[
        Any,
        described(
            CASE,
            "NUMBER",
            r"Samples in a batch. \[default: 128; for resnet18 32, for gpt-40m 8]",
            parser=_count("--batch"),
        ),
    ] = None,
    input_shape: Annotated[
        Any,
        described(
            CASE,
            "SHAPE",
            "Shape of one sample of the model, such as 3x224x224.",
            "--input",
            parser=parse_shape,
        ),
    ] = None,
    memory: Annotated[
        bool,
        described(CASE, "", "Also measure the memory of each way, in its own process.", "--memory"),
    ] = False,
    threads: Annotated[
        Any,
        described(
            RUN,
            "NUMBER",
            r"CPU threads. \[default: as many as torch takes]",
            parser=_count("--threads", cores),
        ),
    ] = None,
    cpu_time: Annotated[
        bool,
        described(
            RUN,
            "",
            "One thread and its CPU seconds: a diagnosis on a busy machine, without a verdict.",
            "--cpu-time",
        ),
    ] = False,
    quick: Annotated[
        bool, described(RUN, "", "Fewer rounds, smaller problems; for a first look.", "--quick")
    ] = False,
    compare: Annotated[
        Path | None,
        described(RUN, "FILE", "bench.json of an earlier run, to show what changed.", "--compare"),
    ] = None,
    out: Annotated[
        Path | None,
        described(RUN, "FOLDER", r"Where bench.json and bench.html go. \[default: runs/bench]"),
    ] = None,
) -> None:
    """Measure speed and memory here, beside dense layers and other sparse ones; leaves figures and
    a picture.

    Without further options: the grid of layers, the performance targets and the wide
    network, in some minutes. Other programs disturb: the share of the machine they take is printed.
    """
    if sum(x is not None for x in (targets, layer, model)) > 1:
        raise BenchError("--targets, --layer and --model are different runs: give one of them")
    if layer is None and model is None:
        for option, given in (("--density", density), ("--batch", batch)):
            if given is not None:
                raise BenchError(
                    f"{option} belongs to --layer or --model: performance targets have their own"
                )
    if input_shape is not None and model is None:
        raise BenchError("--input belongs to --model")
    if memory and layer is None:
        raise BenchError(
            "--memory belongs to --layer: the performance targets p9 to p11 measure memory anyway"
        )
    if cpu_time and threads not in (None, 1):
        raise BenchError("--cpu-time counts one thread: leave --threads out")
    from rewire.app.bench.run import Run

    run = Run(
        quick=quick,
        threads=threads,
        cpu_time=cpu_time,
        out=out or Path("runs") / "bench",
        names=None if targets is None else targets.split(","),
        earlier=compare,
    )
    share = density or 0.1
    if layer is not None:
        run.layer(layer, share, batch or 128, memory)
    elif model is not None:
        run.model(model, input_shape, share, batch)
    else:
        run.everything()

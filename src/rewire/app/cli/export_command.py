"""The command `rewire export`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from rewire.app.cli.failures import CommandError
from rewire.app.cli.options import described

_FORMS, _HOW = "What to write", "How"
_VALUES = ("float", "int8", "ternary")


def export(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    c: Annotated[
        Path | None, described(_FORMS, "FOLDER", "C99 source there: NAME.h and NAME.c.", "--c")
    ] = None,
    program: Annotated[
        Path | None,
        described(_FORMS, "FILE", "A program of torch.export, such as model.pt2.", "--program"),
    ] = None,
    values: Annotated[
        str | None,
        described(_HOW, "KIND", r"float, int8 or ternary weights. \[default: float]", "--values"),
    ] = None,
    name: Annotated[
        str | None,
        described(_HOW, "NAME", r"Of the C files and function. \[default: network]", "--name"),
    ] = None,
) -> None:
    """Write the network of a finished run for use without training, with frozen weights."""
    if c is None and program is None:
        raise CommandError("say what to write: --c FOLDER, --program FILE, or both")
    if name is not None and c is None:
        raise CommandError("--name belongs to --c")
    kind = values or "float"
    if kind not in _VALUES:
        raise CommandError(f"--values: given {kind!r}, allowed are {', '.join(_VALUES)}")
    import torch

    from rewire.app.run_files import INPUTS
    from rewire.app.train.rebuild import load_network
    from rewire.app.train.run_dir import RunDir
    from rewire.export import c as write_c
    from rewire.export import save_program

    model, scaling = load_network(run_dir)
    place = RunDir(run_dir)
    sample = place.read_result()["info"]["signature"]
    shape = sample["shape"]
    if place.read_config().model == "mlp":  # which reads the numbers of a sample in a row
        shape = [math.prod(shape)]
    example = torch.zeros(1, *shape, dtype=torch.int64 if sample["tokens"] else torch.float32)
    if scaling:
        print(f"scaling        the network reads scaled inputs, by {run_dir / INPUTS}")
    try:
        if c is not None:
            made = write_c(model, example, c, name=name or "network", values=kind)  # type: ignore[arg-type]
            for weight in made.weights:
                off = f", relative error {weight.error:.2g}" if weight.error else ""
                print(
                    f"{weight.name:<14} {weight.connections:,} {weight.stored} weights in "
                    f"{weight.bytes:,} bytes{off}"
                )
            print(
                f"constants      {made.constant_bytes:,} bytes\n"
                f"workspace      {4 * made.workspace:,} bytes\n"
                f"multiply-adds  {made.multiply_adds:,}\n"
                f"C source       {made.header}, {made.source}"
            )
        if program is not None:
            size = save_program(model, (example,), program, values=kind)  # type: ignore[arg-type]
            print(f"program        {program}, {size:,} bytes")
    except ValueError as error:
        raise CommandError(str(error)) from None

"""The command `rewire import`: weights of other programs become a sparse state."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from rewire.app.cli.failures import CommandError
from rewire.app.cli.options import given_of, option, with_options
from rewire.formats import FORMATS, readable

_BUDGET, _HOW = "Dense weights keep their largest values", "What is in the file"
_READ = ", ".join(f.name for f in FORMATS.values() if f.reads)


#: What `rewire.export.read.read` is told, by the names that it has for it; ``shape`` apart.
_SETTINGS = {
    "density": option(float, _BUDGET, "SHARE", "Share of the connections to keep."),
    "connections": option(int, _BUDGET, "COUNT", "Number of them to keep."),
    "threshold": option(float, _BUDGET, "NUMBER", "Keep values of a larger magnitude."),
    "distribution": option(str, _BUDGET, "NAME", r"erk, er or uniform. \[default: erk]"),
    "only": option(list[str], _BUDGET, "PATTERN", "Names of weights to make sparse; repeatable."),
    "exclude": option(list[str], _BUDGET, "PATTERN", "Names to leave dense, such as embeddings."),
    "masks": option(Path, _HOW, "FILE", "Masks by the names of the weights; 0 drops."),
    "shape": option(
        list[str], _HOW, "NAME=ROWSxCOLS", "Of a weight, where the file lacks it; repeatable."
    ),
    "format": option(str, _HOW, "NAME", f"One of {_READ}, if the ending misleads."),
}


@with_options(_SETTINGS)
def import_weights(
    file: Annotated[
        Path,
        typer.Argument(
            help=f"Weights of another program ({', '.join(readable())}), or a folder of SciPy's "
            "files.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="The sparse state to write (.safetensors).", show_default=False)
    ],
    **given: Any,
) -> None:
    """Read pruned, masked, dense or sparse weights of another program into a sparse state."""
    if out.suffix.lower() != ".safetensors":
        raise CommandError(f"{out}: the ending is {out.suffix or 'missing'}, use .safetensors")
    settings = given_of(given, _SETTINGS)
    if shapes := settings.pop("shape", None):
        settings["shapes"] = dict(_shape(text) for text in shapes)

    from rewire.export.lists.entries import entries_of
    from rewire.export.read import read
    from rewire.storage import tensors

    try:
        state = read(file, **settings)
    except (ValueError, ImportError) as error:
        raise CommandError(_as_options(str(error))) from None
    found = entries_of(state)
    total = size = 0
    for name, entries in sorted(found.items(), key=lambda item: _natural(item[0])):
        count, (rows, cols) = entries.rows.numel(), entries.matrix_shape
        total, size = total + count, size + rows * cols
        shown = " x ".join(map(str, entries.shape))
        print(f"{name:<24} {shown}, {count:,} connections ({count / (rows * cols):.2%})")
    tensors.write(out, state)
    dense = sum(not key.startswith(tuple(f"{name}." for name in found)) for key in state)
    print(
        f"{'together':<24} {total:,} of {size:,} connections ({total / size:.2%}), {dense} other "
        f"tensors\nstate                    {out}, {out.stat().st_size:,} bytes"
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 behind layer 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, sizes = text.rpartition("=")
    try:
        if not (name and equals):
            raise ValueError
        return name, tuple(int(n) for n in sizes.lower().split("x"))
    except ValueError:
        raise CommandError(
            f"--shape: given {text!r}, allowed is NAME=ROWSxCOLS, such as 0.weight=300x784"
        ) from None


def _as_options(line: str) -> str:
    """An error of `read` with the names that the command line has."""
    for name in _SETTINGS:
        line = line.replace(f"{name}=", f"--{name}")
    return line

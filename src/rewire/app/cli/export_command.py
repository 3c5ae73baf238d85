"""The command `rewire export`: an option for each format of `rewire.formats`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewire.app.cli.failures import CommandError
from rewire.app.cli.options import given_of, option, with_options
from rewire.formats import FORMATS, Format

if TYPE_CHECKING:
    import torch

_FORMS, _HOW = "What to write", "How"
#: What settings that are words may be.
_WORDS = {"values": ("float", "int8", "ternary"), "neurons": ("if", "lif", "none")}
_WRITTEN = {f.name.replace("-", "_"): f for f in FORMATS.values() if f.writes}


def _option(found: Format) -> str:
    return f"--{found.name}"


def _help(found: Format) -> str:
    ending = f" ({', '.join(found.endings)})" if found.endings else ""
    extra = rf" Needs the extra \[{found.extra}]." if found.extra else ""
    return f"{found.holds[:-1]}{ending}.{extra}"


_FILES = {key: option(Path, _FORMS, f.metavar, _help(f), _option(f)) for key, f in _WRITTEN.items()}
_SETTINGS = {
    "values": option(str, _HOW, "KIND", r"float, int8 or ternary weights. \[default: float]"),
    "name": option(str, _HOW, "NAME", r"Of the C files and function. \[default: network]"),
    "neurons": option(
        str, _HOW, "KIND", r"What NIR has in the place of ReLU: if, lif or none. \[default: if]"
    ),
    "dense": option(
        bool, _HOW, "", "Allow dense arrays of any size, where a format has them.", "--dense"
    ),
}


@with_options(_FILES | _SETTINGS)
def export(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    **given: Any,
) -> None:
    """Write the network of a finished run in formats of other programs, or for use without
    training.
    """
    chosen = [(_WRITTEN[key], path) for key, path in given_of(given, _FILES).items()]
    if not chosen:
        several = ", ".join(f"{_option(f)} {f.metavar}" for f in _WRITTEN.values())
        raise CommandError(f"say what to write, one or more of {several}")
    settings = given_of(given, _SETTINGS)
    for key in settings:
        if not any(key in f.settings for f, _ in chosen):
            takers = [_option(f) for f in _WRITTEN.values() if key in f.settings]
            raise CommandError(f"--{key} belongs to {' and '.join(takers)}")
    for key, allowed in _WORDS.items():
        if key in settings and settings[key] not in allowed:
            raise CommandError(
                f"--{key}: given {settings[key]!r}, allowed are {', '.join(allowed)}"
            )
    try:
        writers = [f.writer() for f, _ in chosen]  # before a run is read
    except ImportError as error:
        raise CommandError(str(error)) from None

    from rewire.app.run_files import INPUTS
    from rewire.app.train.rebuild import load_network

    model, scaling = load_network(run_dir)
    if scaling:
        print(f"scaling        the network reads scaled inputs, by {run_dir / INPUTS}")
    known = settings | {"example": _example(run_dir)}
    for (found, path), write in zip(chosen, writers, strict=True):
        try:
            told = write(model, path, **{k: v for k, v in known.items() if k in found.settings})
        except ValueError as error:
            raise CommandError(f"{_option(found)}: {error}") from None
        print(f"{found.name:<14} {path}, {told:,} bytes" if isinstance(told, int) else told)


def _example(run_dir: Path) -> torch.Tensor:
    """A sample of zeros as the network of the run reads it."""
    import torch

    from rewire.app.train.run_dir import RunDir

    place = RunDir(run_dir)
    sample = place.read_result()["info"]["signature"]
    shape = sample["shape"]
    if place.read_config().model == "mlp":  # which reads the numbers of a sample in a row
        shape = [math.prod(shape)]
    return torch.zeros(1, *shape, dtype=torch.int64 if sample["tokens"] else torch.float32)

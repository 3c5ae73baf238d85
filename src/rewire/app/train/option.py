"""How an option of the command line is declared, and what is said of a mistyped name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from rewire.app.errors import TrainError, did_you_mean
from rewire.app.importing import is_path

__all__ = [
    "DATA",
    "METHOD",
    "NETWORK",
    "RUN",
    "TRAINING",
    "BelowOne",
    "Block",
    "Folder",
    "Option",
    "Positive",
    "Share",
    "Shares",
    "Size",
    "Sizes",
    "Source",
    "Words",
    "check_name",
    "did_you_mean",
    "option_field",
]

DATA, NETWORK, METHOD, TRAINING, RUN = "Data", "Network and budget", "Method", "Training", "Run"


@dataclass(frozen=True)
class Option:
    """How the command line shows a field of `TrainConfig`.

    Attributes:
        panel: the heading that it stands under in ``--help``.
        metavar: a word for its value in ``--help``; "" for a flag.
        help: one sentence.
        names: what the user types; by default the name of the field.
        shown: the default in words, where the field's own does not say it.
        allowed: the values in words, where the field's bounds do not say them.
    """

    panel: str
    metavar: str
    help: str
    names: tuple[str, ...] = ()
    shown: str = ""
    allowed: str = ""


def option_field(
    default: Any, panel: str, metavar: str, help: str, *names: str, **more: str
) -> Any:
    """A field of the configuration that is an `Option`."""
    option = Option(panel, metavar, help, names, **more)
    return Field(default, json_schema_extra={"option": cast(Any, option)})


def _parts(value: object) -> object:
    """ "300,100", as the command line has it, in parts; "none" has no part."""
    if not isinstance(value, str):
        return value
    return [] if value.strip().lower() == "none" else [part.strip() for part in value.split(",")]


def _path(source: str) -> str:
    """A path in full, so that a run can be resumed from another folder; names stay as they are."""
    return str(Path(source).absolute()) if is_path(source) and "://" not in source else source


# torch cannot count the elements of a weight with more units
Size = Annotated[int, Field(gt=0, lt=2**40)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Folder = Annotated[Path, AfterValidator(Path.absolute), PlainSerializer(str)]
Source = Annotated[str, AfterValidator(_path)]
Sizes = Annotated[tuple[Size, ...], BeforeValidator(_parts)]
Shares = Annotated[tuple[Share, ...], Field(min_length=1), BeforeValidator(_parts)]
Block = Annotated[tuple[Size, Size, Size], BeforeValidator(_parts)]
Words = Annotated[tuple[str, ...], BeforeValidator(_parts)]


def check_name(option: str, given: str, allowed: Iterable[str]) -> None:
    """Refuse a name that is not in the list."""
    names = list(allowed)
    if given not in names:
        raise TrainError(
            f"{option}: unknown name {given!r}{did_you_mean(given, names)}; "
            f"allowed are {', '.join(names)}"
        )

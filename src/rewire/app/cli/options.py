"""Options of commands: one by one, and made from the fields of `TrainConfig`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic.fields import FieldInfo

from rewire.app.train.config import Option, TrainConfig, options, shown

_Command = TypeVar("_Command", bound=Callable[..., None])


def described(panel: str, metavar: str, text: str, *names: str, parser: Any = None) -> Any:
    """An option of Typer as all commands have them; a default is said in its text."""
    return typer.Option(
        *names,
        help=text,
        metavar=metavar or None,
        parser=parser,
        rich_help_panel=panel,
        show_default=False,
    )


def with_train_options(command: _Command) -> _Command:
    """Give a command an option for each field of `TrainConfig`, before its own.

    The command gets them as keyword arguments (its ``**given``); those that the user left out are
    None. Where the command has a parameter of the name of a field, its own is the option.
    """
    fields = TrainConfig.model_fields
    own_names = inspect.signature(command).parameters
    made = [
        _parameter(name, fields[name], option)
        for name, option in options().items()
        if name not in own_names
    ]
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    # Typer reads signatures, and a function may have another than the one it was written with.
    command.__signature__ = signature.replace(parameters=[*made, *own])  # type: ignore[attr-defined]
    return command


def _parameter(name: str, field: FieldInfo, option: Option) -> inspect.Parameter:
    """A field as a parameter of a function, with Typer's annotation; the default is None."""
    typed: Any = str  # pydantic reads the text
    if field.annotation in (bool, bool | None):
        typed = bool
    elif option.metavar == "FOLDER":
        typed = Path  # the shell completes it
    elif field.default == {}:
        typed = list[str]
    default = option.shown
    if not default and field.default is not None and typed is str:
        default = shown(field.default)
    text = option.help + (rf" \[default: {default}]" if default else "")
    made = described(option.panel, option.metavar, text, *option.names)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[typed | None, made]
    )

"""Options of commands: one by one, and made from the fields of `TrainConfig`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
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


def option(kind: Any, panel: str, metavar: str, text: str, *names: str) -> Any:
    """The annotation of an option of type ``kind`` that is None where the user leaves it out."""
    return Annotated[kind | None, described(panel, metavar, text, *names)]


def with_options(table: Mapping[str, Any]) -> Callable[[_Command], _Command]:
    """Give a command the options of ``table`` (name of an argument -> `option`), before those that
    it declares itself.

    The command gets them as keyword arguments (its ``**given``). Where it has a parameter of the
    same name, its own is the option.
    """

    def extended(command: _Command) -> _Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        leading = [p for p in own if p.kind is not p.KEYWORD_ONLY]
        made = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for name, kind in table.items()
            if name not in signature.parameters
        ]
        parameters = [*leading, *made, *own[len(leading) :]]
        # Typer reads signatures, and a function may have another than the one it was written with.
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return extended


def given_of(given: Mapping[str, Any], table: Iterable[str]) -> dict[str, Any]:
    """The arguments in ``table`` that the user gave."""
    return {name: given[name] for name in table if given[name] is not None}


def train_options() -> dict[str, Any]:
    """An option for each field of `TrainConfig`."""
    fields = TrainConfig.model_fields
    return {name: _of_field(fields[name], declared) for name, declared in options().items()}


def _of_field(field: FieldInfo, declared: Option) -> Any:
    typed: Any = str  # pydantic reads the text
    if field.annotation in (bool, bool | None):
        typed = bool
    elif declared.metavar == "FOLDER":
        typed = Path  # the shell completes it
    elif field.default == {}:
        typed = list[str]
    default = declared.shown
    if not default and field.default is not None and typed is str:
        default = shown(field.default)
    text = declared.help + (rf" \[default: {default}]" if default else "")
    return option(typed, declared.panel, declared.metavar, text, *declared.names)

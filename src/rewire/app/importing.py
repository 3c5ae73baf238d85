"""Functions of the user's own, by "module:name"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewire.app.errors import TrainError

__all__ = ["call_with", "is_importable", "load_object"]


def _find_here() -> None:
    """Let modules in the current folder be found, as ``python -m`` has it."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def is_importable(module: str) -> bool:
    """Whether there is such a module, or the package that it would be in; imports nothing."""
    _find_here()
    first = module.partition(".")[0]
    return bool(first) and importlib.util.find_spec(first) is not None


def load_object(option: str, source: str) -> Any:
    """What "module:attribute" names; modules in the current folder are found. Raises TrainError."""
    module, _, attribute = source.partition(":")
    _find_here()
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # somebody else's code runs
        raise TrainError(
            f"{option}: {source!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    if not callable(found):
        raise TrainError(
            f"{option}: {source!r} is a {type(found).__name__}, allowed is something to call"
        )
    return found


def call_with(function: Callable[..., Any], offered: dict[str, Any]) -> Any:
    """Call ``function`` with those of the arguments that it takes, by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return function()
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return function(**{n: value for n, value in offered.items() if takes_all or n in names})

"""What a user names by a path, or by "module:name"."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from rewire.app.errors import TrainError, UserError
from rewire.storage.reading import brief

__all__ = ["FILE_ENDINGS", "call_with", "find_object", "is_importable", "is_path", "load_object"]

#: The endings of files with samples.
FILE_ENDINGS = (".csv", ".tsv", ".parquet", ".npz", ".mat")


def is_path(source: str) -> bool:
    """Whether this is the path of a file with samples, or of a folder."""
    return "/" in source or Path(source).suffix.lower() in FILE_ENDINGS


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


@contextlib.contextmanager
def foreign(say: Callable[[str], UserError]) -> Iterator[None]:
    """Somebody else's code runs inside the ``with``: what it raises becomes what ``say`` makes of
    it, given in one line.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise say(f"{type(error).__name__}: {brief(error)}") from None


def find_object(source: str) -> Any:
    """What "module:attribute" names; modules in the current folder are found. Raises whatever the
    module does.
    """
    module, _, attribute = source.partition(":")
    _find_here()
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def load_object(option: str, source: str) -> Any:
    """`find_object`, which must be something to call. Raises TrainError."""
    with foreign(lambda said: TrainError(f"{option}: {source!r} cannot be loaded: {said}")):
        found = find_object(source)
    if not callable(found):
        raise TrainError(
            f"{option}: {source!r} is a {type(found).__name__}, allowed is something to call"
        )
    return found


def made_network(source: str, make: Callable[[], Any]) -> nn.Module:
    """What ``make`` returns, somebody else's network. Raises TrainError if that fails."""
    with foreign(lambda said: TrainError(f"--model: {source!r} cannot be made: {said}")):
        model = make()
    if not isinstance(model, nn.Module):
        raise TrainError(
            f"--model: {source!r} returned a {type(model).__name__}, allowed is a torch.nn.Module"
        )
    return model


def call_with(function: Callable[..., Any], offered: dict[str, Any]) -> Any:
    """Call ``function`` with those of the arguments that it takes, by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return function()
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return function(**{n: value for n, value in offered.items() if takes_all or n in names})

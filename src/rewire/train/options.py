"""`--set name=value`: a method's own parameters, checked against the registry."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

from rewire import methods

from .config import MethodOption, did_you_mean
from .errors import TrainError

WORDS: dict[str, bool | None] = {
    "true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None
}  # fmt: skip


def parse_method_options(method: str, pairs: Sequence[str]) -> dict[str, MethodOption]:
    """Turn `["l1=1e-5", ...]` into typed values; an unknown name or a value of the wrong kind is refused."""
    parameters = methods.info(method).parameters()
    parsed: dict[str, MethodOption] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise TrainError(f"--set {pair}: write it as name=value, for example --set l1=1e-5")
        if name == "seed":
            raise TrainError("--set seed: the whole run has one seed, given by --seed")
        if name not in parameters:
            names = ", ".join(parameters) or "none"
            raise TrainError(
                f"--set {name}: {method} has no such parameter{did_you_mean(name, parameters)}; allowed are {names}"
            )
        if name in parsed:
            raise TrainError(f"--set {name}: given twice")
        parsed[name] = _convert(name, text.strip(), parameters[name].annotation)
    return parsed


def _kinds(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, flat."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def _convert(name: str, text: str, annotation: Any) -> MethodOption:
    """Read `text` as the first kind that it fits of those the parameter takes."""
    kinds = _kinds(annotation)
    word = text.lower()
    if word in WORDS and type(WORDS[word]) in kinds:
        return WORDS[word]
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    for kind in kinds:
        if get_origin(kind) is Literal and text in get_args(kind):
            return text
    if str in kinds or typing.Any in kinds:
        return text
    raise TrainError(f"--set {name}={text}: allowed is {' or '.join(dict.fromkeys(map(_shown, kinds)))}")


def _shown(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "none"}
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return names.get(kind, getattr(kind, "__name__", str(kind)))

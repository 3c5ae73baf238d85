"""`--set name=value`: a method's own parameters, checked against the registry."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from rewire.app.errors import TrainError
from rewire.app.train import baselines
from rewire.app.train.config import MethodOption, did_you_mean
from rewire.methods.core.parameters import kinds_of

WORDS: dict[str, bool | None] = {
    "true": True,
    "yes": True,
    "on": True,
    "false": False,
    "no": False,
    "off": False,
    "none": None,
}


def parse_method_options(method: str, pairs: Sequence[str]) -> dict[str, MethodOption]:
    """Turn `["l1=1e-5", ...]` into typed values; refuse unknown names and wrong values."""
    parameters = baselines.info(method).parameters()
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
                f"--set {name}: {method} has no such parameter{did_you_mean(name, parameters)}; "
                f"allowed are {names}"
            )
        if name in parsed:
            raise TrainError(f"--set {name}: given twice")
        parsed[name] = _convert(name, text.strip(), parameters[name].annotation)
    return parsed


def _convert(name: str, text: str, annotation: Any) -> MethodOption:
    """Read `text` as the first kind that it fits of those the parameter takes."""
    kinds = kinds_of(annotation)
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
    several = _several(text, {get_origin(kind) for kind in kinds})
    if several is not None:
        return several
    if str in kinds or typing.Any in kinds:
        return text
    # a schedule cannot be typed
    typed = [kind for kind in kinds if get_origin(kind) is not Callable]
    raise TrainError(
        f"--set {name}={text}: allowed is {' or '.join(dict.fromkeys(map(_shown, typed)))}"
    )


def _several(text: str, kinds: set[Any]) -> list[int | float] | dict[str, int | float] | None:
    """Numbers per layer: "1e-5,1e-6" for a sequence, "conv*:1e-5,fc*:1e-6" for a mapping."""
    parts = [part.strip() for part in text.split(",")]
    try:
        if Sequence in kinds and len(parts) > 1 and ":" not in text:
            return [_number(part) for part in parts]
        if Mapping in kinds and all(":" in part for part in parts):
            pairs = (part.rpartition(":") for part in parts)
            return {pattern.strip(): _number(number) for pattern, _, number in pairs}
    except ValueError:
        pass
    return None


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _shown(kind: Any) -> str:
    if get_origin(kind) is Sequence:
        return "numbers, one per layer (1e-5,1e-6)"
    if get_origin(kind) is Mapping:
        return "numbers by pattern of names (conv*:1e-5,fc*:1e-6)"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        types.NoneType: "none",
    }
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return names.get(kind, getattr(kind, "__name__", str(kind)))

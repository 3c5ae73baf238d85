"""A run beside an earlier one: what a change of code, or of machine, did to each figure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rewire.app.bench.contenders import DENSE
from rewire.app.bench.tables import Sheet, number
from rewire.app.errors import BenchError

__all__ = ["read", "sheet"]

#: Without quartiles, a change below this is taken for noise.
NOISE = 0.05
#: What must be equal for a change to be one of the code.
_ALIKE = {
    "cpu": "the processor",
    "threads": "the threads",
    "kernels": "the instruction set",
    "torch": "torch",
    "others": "the packages beside ours",
}


@dataclass(frozen=True)
class _Entry:
    """A figure of a run; ``best`` says whether the higher or the lower one is better, if known."""

    value: float
    low: float
    high: float
    unit: str
    best: Literal["high", "low", ""]


def read(path: Path, version: int) -> dict[str, Any]:
    """The results of an earlier run, from its bench.json. Raises `BenchError` in one sentence."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"--compare: cannot read {path}: {error}") from None
    form = found.get("format") if isinstance(found, dict) else None
    if form != version:
        raise BenchError(
            f"--compare: {path} is of format {form}, and this version compares format {version}: "
            "measure again with `rewire bench`"
        )
    try:
        sheet(found, found)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BenchError(f"--compare: {path} is no whole bench.json: {error!r}") from None
    return dict(found)


def sheet(old: dict[str, Any], new: dict[str, Any]) -> Sheet:
    """The figures that both runs have, side by side."""
    before, now = dict(_entries(old)), dict(_entries(new))
    rows = [_row(name, before[name], now[name]) for name in now if name in before]
    differ = [shown for key, shown in _ALIKE.items() if old["machine"][key] != new["machine"][key]]
    if old["setting"] != new["setting"]:
        differ.append("how thoroughly was measured")
    note = f"{len(rows)} figures that both runs have"
    if differ:
        note += f"; the runs differ in {', '.join(differ)}, so that not every change is the code's"
    columns = ("figure", "before", "now", "now / before", "verdict")
    return Sheet(f"Beside the run of {old['machine']['started']}", columns, rows, note)


def _entries(results: dict[str, Any]) -> Iterator[tuple[str, _Entry]]:
    for target in results["targets"]:
        for f in target["figures"]:
            if f["value"] is not None:
                best: Literal["high", "low", ""] = "low" if f["sense"] == "<=" else ""
                if f["sense"] == ">=" or (f["unit"] == "x" and not f["sense"]):
                    best = "high"
                yield f"{target['name'].upper()}: {f['name']}", _entry(f, f["unit"], best)
    layer = results["layer"]
    for curve in [*results["grid"], *([layer["curve"]] if layer else [])]:
        where = f"{curve['outputs']} x {curve['inputs']}, batch {curve['batch']}"
        for kind, seconds in curve["seconds"].items():
            quartiles = curve["quartiles"][kind]
            for density, value, (low, high) in zip(
                curve["densities"], seconds, quartiles, strict=True
            ):
                name = f"{where}{'' if kind in DENSE else f', {density:.3g}'}: {kind}"
                given = {"value": 1e3 * value, "low": 1e3 * low, "high": 1e3 * high}
                yield name, _entry(given, "ms", "low")  # of dense ones all densities are one
    model = results["model"]
    for row in model["layers"] if model else ():
        if "speedup" in row:
            given = {"value": row["speedup"], "low": row["low"], "high": row["high"]}
            where = f"{model['model']}, {row['name']} ({row['layer']}, {row['rows']} rows"
            yield f"{where}, {model['density']:g}): dense / sparse", _entry(given, "x", "high")


def _entry(given: dict[str, Any], unit: str, best: Literal["high", "low", ""]) -> _Entry:
    value = given["value"]
    if given.get("low") is None:
        return _Entry(value, value * (1 - NOISE), value * (1 + NOISE), unit, best)
    return _Entry(value, given["low"], given["high"], unit, best)


def _row(name: str, before: _Entry, now: _Entry) -> list[str]:
    if before.low <= now.high and now.low <= before.high:
        verdict = "within noise"
    elif not now.best:
        verdict = "changed"
    else:
        verdict = "better" if (now.value > before.value) == (now.best == "high") else "worse"
    change = number(now.value / before.value) if before.value else ""
    shown = (number(entry.value, entry.unit) for entry in (before, now))
    return [name, *shown, change, verdict]

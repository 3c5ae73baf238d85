"""What a run directory says about its run, finished or not. Only numpy: a report needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

Counts = NDArray[np.int64]


class ReportError(Exception):
    """A folder of which no report can be made; the message is one line."""


@dataclass(frozen=True)
class Layer:
    """One sparse layer: its size, and how many connections each output and each input has."""

    name: str
    inputs: int
    outputs: int
    fan_in: Counts
    fan_out: Counts

    @property
    def connections(self) -> int:
        """Number of connections."""
        return int(self.fan_in.sum())


@dataclass(frozen=True)
class Run:
    """All that the report shows."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any] | None
    info: dict[str, Any]
    layers: list[Layer]


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ReportError(f"{path} is damaged: it is not an object")
    return value


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; one that a killed run left torn is passed over."""
    text = path.read_text("utf-8") if path.exists() else ""
    whole, _, _ = text.rpartition("\n")
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ReportError(f"{path} is damaged: {error}") from None


def _layers(info: dict[str, Any], path: Path, prefix: str) -> list[Layer]:
    """Fan-in and fan-out from the topology in a safetensors file."""
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ReportError(f"cannot read {path}: {error}") from None
    layers = []
    for entry in info["layers"]:
        try:
            rows, cols = (tensors[f"{prefix}{entry['name']}.{part}"] for part in ("rows", "cols"))
        except KeyError as error:
            raise ReportError(f"{path} has no tensor {error}") from None
        active = rows >= 0  # an empty slot has row and column -1
        fan_in = np.bincount(rows[active], minlength=entry["outputs"])
        fan_out = np.bincount(cols[active], minlength=entry["inputs"])
        layers.append(Layer(entry["name"], entry["inputs"], entry["outputs"], fan_in, fan_out))
    return layers


def read_run(folder: Path) -> Run:
    """Read a run directory; of an unfinished run the last checkpoint counts."""
    if not (folder / "config.json").exists():
        raise ReportError(f"there is no run in {folder}: it has no config.json")
    config = _object(folder / "config.json")
    metrics = _metrics(folder / "metrics.jsonl")
    result = _object(folder / "result.json") if (folder / "result.json").exists() else None
    if result is not None:
        info, path, prefix = result["info"], folder / "model.safetensors", ""
    else:
        if not (folder / "checkpoint.json").exists():
            raise ReportError(f"the run in {folder} has neither a result nor a checkpoint yet")
        commit = _object(folder / "checkpoint.json")
        info, path, prefix = commit["info"], folder / commit["file"], "state.model."
    layers = _layers(info, path, prefix)
    return Run(folder.resolve().name, config, metrics, result, info, layers)

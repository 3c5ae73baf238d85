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
    """One layer as it is in the file: its size, how many connections, and how many each output and each input has.

    Of a dense layer there is only the number of connections, which are its weights that are not 0.
    """

    name: str
    inputs: int
    outputs: int
    connections: int
    fan_in: Counts | None = None
    fan_out: Counts | None = None


@dataclass(frozen=True)
class Run:
    """All that the report shows."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any] | None
    info: dict[str, Any]
    layers: list[Layer]

    @property
    def before(self) -> dict[str, Any]:
        """Size of the network that training began with, or of its dense twin; empty if the run has not compared."""
        return self._compared("before")

    @property
    def after(self) -> dict[str, Any]:
        """Size of the finished network; empty if the run has not compared."""
        return self._compared("after")

    @property
    def inference(self) -> dict[str, Any]:
        """How long inference takes with both; empty if the run has not compared."""
        return self._compared("inference")

    def _compared(self, part: str) -> dict[str, Any]:
        found: dict[str, Any] = (self.result or {}).get(part) or {}
        return found


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


def _layers(info: dict[str, Any], path: Path, prefix: str, last: dict[str, Any] | None) -> list[Layer]:
    """The layers in a safetensors file; ``last`` is the last epoch's line of a run that goes on."""
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ReportError(f"cannot read {path}: {error}") from None
    layers: list[Layer] = []
    for number, entry in enumerate(info["layers"]):
        name = entry["name"]
        rows, cols = (tensors.get(f"{prefix}{name}.{part}") for part in ("rows", "cols"))
        weight = tensors.get(prefix + name)
        if rows is not None and cols is not None:
            # Layers that were dense may have lost units before they became sparse.
            outputs, inputs = (
                int(n) for n in tensors.get(f"{prefix}{name}.shape", (entry["outputs"], entry["inputs"]))
            )
            active = rows >= 0  # an empty slot has row and column -1
            fan_in = np.bincount(rows[active], minlength=outputs)
            fan_out = np.bincount(cols[active], minlength=inputs)
            layers.append(Layer(name, inputs, outputs, int(active.sum()), fan_in, fan_out))
        elif prefix and info.get("starts_dense"):  # what takes part is for the method to say: gates, thresholds
            inputs = layers[-1].outputs if layers else entry["inputs"]
            units = (last or {}).get("units") or [layer["outputs"] for layer in info["layers"]]
            connections = (last or {}).get("connections") or [layer["connections"] for layer in info["layers"]]
            layers.append(Layer(name, inputs, units[number], connections[number]))
        elif weight is not None and weight.ndim == 2:
            layers.append(Layer(name, weight.shape[1], weight.shape[0], int(np.count_nonzero(weight))))
        else:
            missing = "cols" if rows is not None else "rows"
            raise ReportError(f"{path} has no tensor '{prefix}{name}.{missing}'")
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
    layers = _layers(info, path, prefix, metrics[-1] if metrics else None)
    return Run(folder.resolve().name, config, metrics, result, info, layers)

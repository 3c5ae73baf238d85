"""Reads a run directory for the report, finished or not. Needs numpy, but no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from rewire.app import run_files
from rewire.app.errors import ReportError, RunFileError
from rewire.app.run_files import COMMIT, CONFIG, MODEL, RESULT, Prefix
from rewire.storage import files, reading

Counts = NDArray[np.int64]

_ATTEMPTS = 5  # to read a run that goes on meanwhile

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}


@dataclass(frozen=True)
class Fan:
    """How many connections each of ``size`` units has: ``counts`` of the ``units`` that have any,
    in ascending order.

    A layer may have more units than there is memory for: only those with connections are kept.
    """

    size: int
    units: Counts
    counts: Counts

    @property
    def unused(self) -> int:
        """Units without a connection."""
        return self.size - len(self.units)

    @property
    def mean(self) -> float:
        """Connections of a unit."""
        return int(self.counts.sum()) / self.size

    @property
    def low(self) -> int:
        """Fewest connections of a unit."""
        return 0 if self.unused else int(self.counts.min())

    @property
    def high(self) -> int:
        """Most connections of a unit."""
        return int(self.counts.max()) if len(self.counts) else 0

    def all(self) -> Counts:
        """Connections of every unit, (size,)."""
        found = np.zeros(self.size, np.int64)
        found[self.units] = self.counts
        return found


@dataclass(frozen=True)
class Layer:
    """One layer as it is in the file: its size, how many connections, and how many each output and
    each input has.

    Of a dense layer there is only the number of connections, which are its weights that are not 0.
    """

    name: str
    inputs: int
    outputs: int
    connections: int
    fan_in: Fan | None = None
    fan_out: Fan | None = None


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
    def data(self) -> str:
        """The name of the data set; a path stays private."""
        return str(self.info.get("data", self.config.get("data")))

    @property
    def score(self) -> str:
        """Which score the task has: "accuracy" or "r2"."""
        return str(self.info.get("score", "accuracy"))

    @property
    def before(self) -> dict[str, Any]:
        """Size of the network before training, or of its dense twin; empty if not compared."""
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


class _Tensors:
    """The tensors of a safetensors file, made into arrays when they are asked for."""

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        """``sha256`` is what the file must have; None where it was verified already."""
        self.path = path
        try:
            content = reading.read_bytes(path)
            if sha256 is not None and (found := files.sha256_bytes(content)) != sha256:
                raise ReportError(f"{path} is damaged: sha256 {found}, expected {sha256}")
            self.found: dict[str, Any] = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
        except OSError as error:
            raise ReportError(f"cannot read {path}: {error.strerror}") from None
        except reading.FileError as error:
            raise ReportError(str(error)) from None
        except (safetensors.SafetensorError, ValueError) as error:
            raise ReportError(f"cannot read {path}: {reading.brief(error)}") from None

    def get(self, name: str) -> NDArray[Any] | None:
        """A tensor; None if there is none of this name or of its dtype in numpy."""
        view = self.found.get(name)
        if view is None or view["dtype"] not in _DTYPES:
            return None
        flat: NDArray[Any] = np.frombuffer(view["data"], dtype=_DTYPES[view["dtype"]])
        try:
            shaped: NDArray[Any] = flat.reshape(view["shape"])
        except ValueError as error:  # an empty tensor with more rows than numpy can count
            raise self.refuse(
                name, f"has the shape {reading.brief(view['shape'], 100)}: {error}"
            ) from None
        return shaped

    def refuse(self, name: str, reason: str) -> ReportError:
        """The error for a tensor that is wrong."""
        return ReportError(f"{self.path} is damaged: {name} {reason}")


def _layers(
    info: Mapping[str, Any], tensors: _Tensors, prefix: str, last: Mapping[str, Any] | None
) -> list[Layer]:
    """The layers in a safetensors file; ``last`` is the last epoch's line of a run that goes on."""
    layers: list[Layer] = []
    for number, entry in enumerate(info["layers"]):
        name = entry["name"]
        rows, cols, shape = (
            tensors.get(f"{prefix}{name}.{part}") for part in ("rows", "cols", "shape")
        )
        weight = tensors.get(prefix + name)
        if rows is not None and cols is not None:
            outputs, inputs = entry["outputs"], entry["inputs"]
            # layers that were dense may have lost units before they became sparse
            if shape is not None:
                matrix = shape.ndim == 1 and 2 <= len(shape) <= 5
                if not matrix or shape.dtype.kind not in "iu" or int(shape.min()) < 1:
                    raise tensors.refuse(f"{name}.shape", "is no size of a weight")
                outputs, *kernel = (int(n) for n in shape)
                inputs = math.prod(kernel)
            for part, index in (("rows", rows), ("cols", cols)):
                if index.ndim != 1 or index.dtype.kind != "i" or index.shape != rows.shape:
                    raise tensors.refuse(f"{name}.{part}", "is no list of positions")
            if not np.array_equal(rows >= 0, cols >= 0):
                raise tensors.refuse(f"{name}.rows", "has other empty slots than its columns")
            active = rows >= 0  # an empty slot has row and column -1
            fan_in, fan_out = (
                _fan(index[active], size, tensors, f"{name}.{part}")
                for index, size, part in ((rows, outputs, "rows"), (cols, inputs, "cols"))
            )
            layers.append(Layer(name, inputs, outputs, int(active.sum()), fan_in, fan_out))
        # the method says what takes part, by gates or thresholds
        elif prefix and info.get("starts_dense"):
            stack = info.get("model", "mlp") == "mlp"
            inputs = layers[-1].outputs if layers and stack else entry["inputs"]
            units = (last or {}).get("units") or [layer["outputs"] for layer in info["layers"]]
            connections = (last or {}).get("connections") or [
                layer["connections"] for layer in info["layers"]
            ]
            layers.append(Layer(name, inputs, units[number], connections[number]))
        elif weight is not None and weight.ndim >= 2:
            inputs = math.prod(weight.shape[1:])
            layers.append(Layer(name, inputs, weight.shape[0], int(np.count_nonzero(weight))))
        else:
            missing = "cols" if rows is not None else "rows"
            raise ReportError(f"{tensors.path} has no tensor '{prefix}{name}.{missing}'")
    return layers


def _fan(index: NDArray[Any], size: int, tensors: _Tensors, name: str) -> Fan:
    units, counts = np.unique(index, return_counts=True)
    if len(units) and int(units[-1]) >= size:
        raise tensors.refuse(name, f"has {int(units[-1])}, allowed are 0 to {size - 1}")
    return Fan(size, units.astype(np.int64), counts.astype(np.int64))


def read_run(folder: Path) -> Run:
    """Read a run directory; of an unfinished run the last checkpoint counts.

    Everything is verified against the checksums first; raises ReportError. Memory: twice the size
    of the tensors.
    """
    if not (folder / CONFIG).exists():
        raise ReportError(f"there is no run in {folder}: it has no config.json")
    for _ in range(_ATTEMPTS):
        before = _moment(folder)
        try:
            return _read(folder)
        except (ReportError, RunFileError) as error:
            # A run that goes on may have replaced its checkpoint meanwhile: then look again.
            if _moment(folder) == before:
                raise ReportError(str(error)) from None
    raise ReportError(f"the run in {folder} goes on faster than it can be read; try again")


def _moment(folder: Path) -> list[tuple[int, int] | None]:
    """What changes whenever a run in the folder goes on."""

    def moment(path: Path) -> tuple[int, int] | None:
        try:
            status = path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    return [moment(folder / name) for name in (COMMIT, RESULT)]


def _read(folder: Path) -> Run:
    config = run_files.read_object(folder / CONFIG)
    config_sha256 = run_files.config_sum(config)
    if (folder / RESULT).exists():
        result: dict[str, Any] | None = run_files.read_result(folder, config_sha256)
        assert result is not None
        info, prefix, length = result["info"], "", None
        tensors = _Tensors(folder / MODEL)
    else:
        if not (folder / COMMIT).exists():
            raise ReportError(f"the run in {folder} has neither a result nor a checkpoint yet")
        commit = run_files.read_commit(folder)
        if commit["config_sha256"] != config_sha256:
            raise ReportError(
                f"{folder / CONFIG} was changed after the checkpoint was made, or is of another run"
            )
        result, info, prefix, length = None, commit["info"], "state.model.", commit["metrics_bytes"]
        run_files.metrics_prefix(folder, Prefix(length, commit["metrics_sha256"]))
        tensors = _Tensors(folder / commit["file"], commit["sha256"])
    metrics = run_files.read_metrics(folder, length)
    run_files.check_together(folder, metrics, info)
    layers = _layers(info, tensors, prefix, metrics[-1] if metrics else None)
    return Run(folder.resolve().name, config, metrics, result, info, layers)

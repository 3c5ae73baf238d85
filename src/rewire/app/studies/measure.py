"""What a study measures of a run besides its scores, while it is trained."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewire.app.data import Dataset
from rewire.app.errors import NotAvailable
from rewire.app.resident import Memory
from rewire.app.run_files import METRICS
from rewire.app.train.metrics import EpochRecord
from rewire.app.train.observer import Observer
from rewire.app.train.parts import Parts
from rewire.nn import freeze, sparse_weights
from rewire.nn.forward.modes import evaluating
from rewire.nn.inspect.cost import cost

__all__ = ["Meter", "PeakMemory"]

#: The meter's own file in the folder of a run, a line an epoch.
MEASURED = "measured.jsonl"
POINTS = 100  # at most, in a curve
VALUES = 60  # at most, in a distribution of degrees
PIXELS = 1 << 14  # at most, in a picture of the inputs
SAMPLES = 256  # whose inference is timed
BINS = 10  # of confidence
SECONDS = 0.3  # for timing inference


class PeakMemory:
    """Most memory that training took: above what the process had with the data loaded."""

    def __init__(self) -> None:
        self.memory, self.before = Memory(), 0
        with contextlib.suppress(NotAvailable, OSError):
            self.memory.reset()
            self.before = self.memory.now()

    def bytes(self) -> int | None:
        """Bytes so far; None where the system does not tell."""
        if not self.before:
            return None
        try:
            return max(0, self.memory.peak() - self.before)
        except (NotAvailable, OSError):
            return None


class Meter(Observer):
    """Follows a run and holds, at its end, all that tables and reports show of it."""

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        self.folder, self.dataset = folder, dataset
        self.memory = PeakMemory()
        self.measured: dict[str, Any] = {}

    def made(self, parts: Parts, *, resume: bool) -> None:
        """Remember the connections of the start."""
        self.parts = parts
        self.first = _positions(parts.model)
        if not resume:
            (self.folder / MEASURED).unlink(missing_ok=True)

    def epoch_ended(self, record: EpochRecord) -> None:
        """Add a line of what this epoch cost and what is left of the start."""
        now = _positions(self.parts.model)
        kept = total = 0
        for name, keys in self.first.items():
            if name in now:
                kept += int(torch.isin(keys, now[name], assume_unique=True).sum())
                total += len(keys)
        line = {
            "epoch": record.epoch,
            "multiply_adds": cost(self.parts.model, self._sample(2)).multiply_adds,
            "survived": kept / total if total else None,
            "peak": self.memory.bytes(),
        }
        with open(self.folder / MEASURED, "a", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")

    def _sample(self, count: int) -> Tensor:
        return self.parts.data.test[0][:count]

    def finished(self, model: nn.Module, result: Mapping[str, Any]) -> None:
        """Measure the finished network."""
        lines = [json.loads(line) for line in (self.folder / METRICS).read_text().splitlines()]
        own = {line["epoch"]: line for line in self._own_lines()}
        peaks = [line["peak"] for line in own.values()] + [self.memory.bytes()]
        seen = result["info"]["samples"]["train"]
        # a product forward, one for the gradient of the inputs, one for that of the weights
        adds = [3 * seen * own[n]["multiply_adds"] for n in range(1, len(lines) + 1) if n in own]
        info = result["info"]
        self.measured = {
            "metric": info.get("score", "accuracy"),
            "connections": result["connections"],
            "possible": result["possible_connections"],
            "seconds": result["seconds"],
            "epochs": len(lines),
            "steps": result["steps"],
            "samples": info["samples"],
            "versions": result["versions"],
            "peak_memory": max((p for p in peaks if p is not None), default=None),
            "training_multiply_adds": sum(adds) if len(adds) == len(lines) else None,
            "multiply_adds": cost(model, self._sample(2)).multiply_adds,
            "inference": self._inference(model),
            "curves": _curves(lines, own),
            "degrees": _degrees(model),
            "picture": _picture(model, info.get("image_shape")),
            "calibration": self._calibration(model),
        }

    def _own_lines(self) -> list[dict[str, Any]]:
        found = []
        path = self.folder / MEASURED
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # cut short by a kill
                found.append(json.loads(line))
        return found

    def _inference(self, model: nn.Module) -> dict[str, Any]:
        """Median milliseconds of a batch, with the network frozen where that can be done."""
        x = self._sample(SAMPLES)
        frozen = True
        try:
            model = freeze(model)
        except ValueError:  # it has no sparse weights, or layers of somebody else's
            frozen = False
        took: list[float] = []
        with evaluating(model), torch.inference_mode():
            model(x)
            begun = time.perf_counter()
            while len(took) < 15 or (len(took) < 300 and time.perf_counter() - begun < SECONDS):
                start = time.perf_counter()
                model(x)
                took.append(time.perf_counter() - start)
        return {
            "ms": 1000 * statistics.median(took),
            "samples": len(x),
            "threads": torch.get_num_threads(),
            "frozen": frozen,
        }

    def _calibration(self, model: nn.Module) -> list[list[float]] | None:
        """By bin of confidence on the test set: samples, sum of confidences, samples right."""
        x, y = self.parts.data.test
        if y.dtype != torch.int64 or y.dim() != 1:
            return None
        bins = torch.zeros(BINS, 3, dtype=torch.float64)
        with evaluating(model), torch.inference_mode():
            for first in range(0, len(y), 1000):
                logits = model(x[first : first + 1000])
                if logits.dim() != 2:
                    return None
                confidence, predicted = logits.double().softmax(1).max(1)
                right = (predicted == y[first : first + 1000]).double()
                place = (confidence * BINS).long().clamp(max=BINS - 1)
                ones = torch.ones_like(right)
                bins.index_add_(0, place, torch.stack([ones, confidence, right], 1))
        return [[round(value, 6) for value in row] for row in bins.tolist()]


def _positions(model: nn.Module) -> dict[str, Tensor]:
    """The positions of the connections of every sparse weight, (connections,) int64."""
    found = {}
    for name, weight in sparse_weights(model):
        active = weight.rows >= 0
        rows, cols = weight.rows[active].long(), weight.cols[active].long()
        found[name] = rows * weight.matrix_shape[1] + cols
    return found


def _curves(
    lines: list[dict[str, Any]], own: Mapping[int, Mapping[str, Any]]
) -> dict[str, list[float | None]]:
    """Scores and changes over time, at most `POINTS` of them."""
    step = math.ceil(len(lines) / POINTS)
    chosen = [line for line in lines if line["epoch"] % step == 0 or line is lines[-1]]
    found: dict[str, list[float | None]] = {
        name: [line.get(name) for line in chosen]
        for name in ("epoch", "train_loss", "train_accuracy", "validation_accuracy")
    }
    # of a regression the score is R²
    for name in ("train", "validation"):
        if f"{name}_r2" in chosen[-1]:
            found[f"{name}_accuracy"] = [line.get(f"{name}_r2") for line in chosen]
    found["connections"] = [sum(line["connections"]) for line in chosen]
    found["turnover"] = [sum(line["grown"]) / max(sum(line["connections"]), 1) for line in chosen]
    found["survived"] = [own.get(line["epoch"], {}).get("survived") for line in chosen]
    return {
        name: [v if v is None or isinstance(v, int) else float(f"{v:.5g}") for v in values]
        for name, values in found.items()
    }


def _degrees(model: nn.Module) -> list[dict[str, Any]]:
    """Of each sparse weight how many outputs have which fan-in, and inputs which fan-out."""
    found = []
    for name, weight in sparse_weights(model):
        outputs, inputs = weight.matrix_shape
        part: dict[str, Any] = {"name": name, "outputs": outputs, "inputs": inputs}
        for kind, counts in (("in", weight.fan_in()), ("out", weight.fan_out())):
            width = int(counts.max()) // VALUES + 1
            part[kind] = {"width": width, "units": torch.bincount(counts // width).tolist()}
        found.append(part)
    return found


def _picture(model: nn.Module, shape: list[int] | None) -> dict[str, Any] | None:
    """How many connections lead from every pixel into the first layer."""
    weights = list(sparse_weights(model))
    if not shape or len(shape) != 2 or not weights or math.prod(shape) > PIXELS:
        return None
    weight = weights[0][1]
    if weight.shape[1] != math.prod(shape):
        return None
    return {"shape": list(shape), "counts": weight.fan_out().tolist()}

"""A small, quick run for the tests of the training loop."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from rewire.app import data
from rewire.app.data import Dataset
from rewire.app.train.config import TrainConfig, make_config

OPTIONS: dict[str, Any] = {
    "hidden": [12, 9],
    "density": [0.2],
    "epochs": 2,
    "batch_size": 250,
    "optimizer": "sgd",
    "lr": 0.3,
    "lr_decay": 0.9,
    "threads": 1,
    "method_options": {"l1": 0.3, "noise": 0.3},  # so strong that a few steps rewire much
}


def config(**changes: Any) -> TrainConfig:
    return make_config(OPTIONS | changes)


@functools.cache
def dataset() -> Dataset:
    return data.load("digits")


def tiny(samples: int = 20, features: int = 6, classes: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(samples, features, generator=generator)
    y = torch.arange(samples) % classes
    return Dataset("tiny", x, y, x, y, tuple(map(str, range(classes))))


def outcome(folder: Path) -> tuple[bytes, list[dict[str, Any]], dict[str, Any]]:
    """What must not depend on interruptions: model, metrics and result, but for the seconds."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    for part in (*metrics, result):
        del part["seconds"]
    result.pop("inference", None)  # milliseconds as well
    return (folder / "model.safetensors").read_bytes(), metrics, result

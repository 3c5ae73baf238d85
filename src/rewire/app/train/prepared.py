"""The samples as a network reads them: held out, standardised, in shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rewire.app.data import Dataset
from rewire.app.data.rows import Rows
from rewire.app.data.splitting import check_classes
from rewire.app.errors import TrainError
from rewire.app.train import scaling
from rewire.app.train.batches import AUGMENTATIONS, Inputs, split
from rewire.app.train.config import TrainConfig
from rewire.app.train.option import check_name
from rewire.app.train.scaling import Scaling
from rewire.app.train.task import Task, task_of

__all__ = ["Part", "Prepared", "prepare"]

#: Inputs and targets.
Part = tuple[Tensor | Inputs, Tensor]


@dataclass(frozen=True)
class Prepared:
    """The samples of a run.

    Attributes:
        task: loss and score.
        train, validation, test: inputs and targets; validation has no sample where it is off.
        augment: how training images are changed.
        inputs, targets: how they were standardised; None where they are as they were.
    """

    task: Task
    train: Part
    validation: Part
    test: Part
    augment: tuple[str, ...]
    inputs: Scaling | None
    targets: Scaling | None

    def tensors(self) -> dict[str, Tensor]:
        """What somebody who uses the network needs to scale inputs, and outputs back."""
        found = {"inputs": self.inputs, "targets": self.targets}
        return {
            f"{name}.{part}": getattr(scale, part).clone()
            for name, scale in found.items()
            if scale is not None
            for part in ("mean", "factor")
        }


def prepare(config: TrainConfig, dataset: Dataset) -> Prepared:
    """Hold out a validation part and scale everything as the training part says.

    Raises `TrainError`, and `DataError` for a class that is missing in a part.
    """
    parts = dict(zip(("train", "validation", "test"), _parts(config, dataset), strict=True))
    inputs = targets = None
    standardise = dataset.standardise if config.standardise is None else config.standardise
    if standardise and dataset.tokens:
        raise TrainError("--standardise: the samples are tokens, which have no mean")
    if standardise:
        inputs = scaling.fit(dataset, parts["train"][0])
        parts = {n: (scaling.apply(inputs, x, dataset), y) for n, (x, y) in parts.items()}
    if dataset.goal == "regression":
        targets = scaling.fit_targets(parts["train"][1])
        parts = {n: (x, (y - targets.mean) * targets.factor) for n, (x, y) in parts.items()}
    shaped = {n: (_shaped(config, dataset, x), y) for n, (x, y) in parts.items()}
    return Prepared(
        task_of(dataset),
        **shaped,
        augment=_augment(config, dataset),
        inputs=inputs,
        targets=targets,
    )


def _parts(config: TrainConfig, dataset: Dataset) -> Iterator[tuple[Rows, Tensor]]:
    """Training, validation and test part, as they are."""
    x, y = dataset.train_x, dataset.train_y
    if dataset.validation_x is not None and dataset.validation_y is not None:
        train, held_out = (x, y), (dataset.validation_x, dataset.validation_y)
    else:
        stratify = dataset.stratify and y.dim() == 1
        train, held_out = split(x, y, config.validation, config.seed, stratify=stratify)
        if not len(train[1]):
            raise TrainError(f"--validation: {config.validation} leaves no sample to train on")
        if config.validation and not len(held_out[1]):
            raise TrainError(
                f"--validation: {config.validation} of {len(train[1])} samples is less than one; "
                "0 turns it off"
            )
        if stratify and dataset.goal == "classification" and len(held_out[1]):
            for part, (_, labels) in (("training", train), ("validation", held_out)):
                check_classes(
                    labels,
                    dataset.classes,
                    part,
                    y,
                    "leave the class out, choose another --validation, or --validation 0",
                )
    yield train
    yield held_out
    yield dataset.test_x, dataset.test_y


def _shaped(config: TrainConfig, dataset: Dataset, x: Rows) -> Tensor | Inputs:
    """A perceptron reads (samples, features), other networks the shape of a sample."""
    flat = config.model == "mlp" or dataset.shape == (dataset.features,)
    if flat and isinstance(x, Tensor) and x.dtype == torch.float32:
        return x
    return Inputs(x, (dataset.features,) if flat else dataset.shape)


def _augment(config: TrainConfig, dataset: Dataset) -> tuple[str, ...]:
    kinds = dataset.augment if config.augment is None else config.augment
    for kind in kinds:
        check_name("--augment", kind, AUGMENTATIONS)
    if kinds and dataset.image_shape is None:
        raise TrainError(f"--augment: this is for images, and {dataset.name} has none")
    return kinds

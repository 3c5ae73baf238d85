"""What every loader returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rewire.app.data.rows import Rows
from rewire.app.errors import DataError

__all__ = ["IGNORED", "Dataset", "Goal"]

Goal = Literal["classification", "regression"]

#: The label of steps that do not count, such as those behind the end of a short sequence.
IGNORED = -100


@dataclass(frozen=True)
class Dataset:
    """A task, whole in memory: samples to train on, to test on, and perhaps to validate on.

    Attributes:
        train_x, test_x: float32 (samples, features), or `rewire.app.data.rows` of that shape; int64
            where features are tokens.
        train_y, test_y: int64 class numbers (samples,), or (samples, steps) where each step has
            one; float32 (samples, targets) for a regression.
        classes: names of the classes; none for a regression.
        image_shape: (height, width) or (channels, height, width) where the features are pixels.
        sha256: checksum of each file that it came from.
        shape: of one sample, whose numbers the features are; by default that of the image, or
            (features,).
        validation_x, validation_y: samples to report on while training, where they are given; else
            a part of the training samples is held out.
        tokens: how many different tokens there are; 0 where samples are numbers.
        standardise: whether training should see standardised inputs, if the user does not say.
        augment: how images are changed at random, if the user does not say.
        stratify: hold out validation samples of each class in proportion.
        padded: steps of zeros at the end of a sample are no part of it.
        feature_names: names of the features, where they have some.
        target_names: names of the targets of a regression.
    """

    name: str
    train_x: Rows
    train_y: Tensor
    test_x: Rows
    test_y: Tensor
    classes: tuple[str, ...] = ()
    image_shape: tuple[int, ...] | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    validation_x: Rows | None = None
    validation_y: Tensor | None = None
    tokens: int = 0
    standardise: bool = False
    augment: tuple[str, ...] = ()
    stratify: bool = False
    padded: bool = False
    feature_names: tuple[str, ...] = ()
    target_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.shape:
            object.__setattr__(self, "shape", self.image_shape or (int(self.train_x.shape[1]),))
        for part, x, y in self.parts():
            self._check(part, x, y)
        if math.prod(self.shape) != self.features:
            raise DataError(
                f"data set {self.name!r}: samples of shape {self.shape} do not have "
                f"{self.features} numbers"
            )

    def parts(self) -> list[tuple[str, Rows, Tensor]]:
        """Name, samples and targets of each part there is."""
        found = [("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)]
        if self.validation_x is not None and self.validation_y is not None:
            found.append(("validation", self.validation_x, self.validation_y))
        return found

    def _check(self, part: str, x: Rows, y: Tensor) -> None:
        several = 2 if self.goal == "regression" or self.each_step else 1
        if len(x.shape) != 2 or y.dim() != several or len(x) != len(y) or len(x) == 0:
            wanted = "(samples,)" if several == 1 else "(samples, numbers)"
            raise DataError(
                f"data set {self.name!r}: the {part} part has inputs of shape {tuple(x.shape)} and "
                f"labels of shape {tuple(y.shape)}; allowed are (samples, features) and {wanted}, "
                "samples > 0"
            )
        if x.shape[1] != self.features:
            raise DataError(
                f"data set {self.name!r}: train and {part} samples have different numbers of "
                f"features, {self.features} and {x.shape[1]}"
            )
        inputs = torch.int64 if self.tokens else torch.float32
        targets = torch.float32 if self.goal == "regression" else torch.int64
        if y.dtype != targets or (isinstance(x, Tensor) and x.dtype != inputs):
            raise DataError(f"data set {self.name!r}: inputs must be {inputs} and labels {targets}")
        if self.goal == "classification":
            counted = y[y != IGNORED] if self.each_step else y
            low, high = (int(counted.min()), int(counted.max())) if len(counted) else (0, 0)
            if low < 0 or high >= len(self.classes):
                raise DataError(
                    f"data set {self.name!r}: the {part} labels go from {low} to {high}; "
                    f"allowed is 0 to {len(self.classes) - 1}"
                )

    @property
    def features(self) -> int:
        """Number of input features."""
        return int(self.train_x.shape[1])

    @property
    def goal(self) -> Goal:
        """Whether classes or numbers are to be found."""
        return "classification" if self.classes else "regression"

    @property
    def each_step(self) -> bool:
        """Whether each step of a sample has a class."""
        return bool(self.classes) and self.train_y.dim() == 2

    @property
    def outputs(self) -> int:
        """Numbers that a network for it gives."""
        return len(self.classes) or int(self.train_y.shape[1])

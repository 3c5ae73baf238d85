"""What every loader returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewire.app.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """A classification task, whole in memory.

    `train_x` and `test_x` are float32 (samples, features) in [0, 1]; `train_y` and `test_y` are
    int64 class numbers; `image_shape` is (height, width) where the features are the pixels of an
    image; `sha256` maps each file it came from to its checksum.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    image_shape: tuple[int, ...] | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, x, y in (
            ("train", self.train_x, self.train_y),
            ("test", self.test_x, self.test_y),
        ):
            if x.dim() != 2 or y.dim() != 1 or x.shape[0] != y.shape[0] or x.shape[0] == 0:
                raise DataError(
                    f"data set {self.name!r}: the {part} part has inputs of shape "
                    f"{tuple(x.shape)} and "
                    f"labels of shape {tuple(y.shape)}; "
                    "allowed are (samples, features) and (samples,), samples > 0"
                )
            if x.dtype != torch.float32 or y.dtype != torch.int64:
                raise DataError(f"data set {self.name!r}: inputs must be float32 and labels int64")
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= len(self.classes):
                raise DataError(
                    f"data set {self.name!r}: the {part} labels go from {low} to {high}; "
                    f"allowed is 0 to {len(self.classes) - 1}"
                )
        if self.train_x.shape[1] != self.test_x.shape[1]:
            raise DataError(
                f"data set {self.name!r}: train and test samples have different numbers of features"
            )

    @property
    def features(self) -> int:
        """Number of input features."""
        return int(self.train_x.shape[1])

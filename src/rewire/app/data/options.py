"""What a user says about a file of samples."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from rewire.app.errors import DataError

__all__ = ["FileOptions"]


@dataclass(frozen=True)
class FileOptions:
    """How samples of one's own are read and divided.

    Attributes:
        target: names of columns or of an array, with commas; None for the usual names.
        task: what is to be found; "auto" for what the target looks like.
        test_share: share of the samples that is the test set, where ``test_data`` is None.
        test_data, validation_data: files of the same kind with the other parts.
        split_seed: decides which samples are the test set.
        image_size: pixels a side to which the images of a folder are resized.
    """

    target: str | None = None
    task: Literal["auto", "classification", "regression"] = "auto"
    test_share: float = 0.2
    test_data: str | None = None
    validation_data: str | None = None
    split_seed: int = 0
    image_size: int | None = None

    @classmethod
    def of(cls, config: object) -> FileOptions:
        """Those that a training was given, which has them under the same names."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def refuse(self, source: str, *names: str) -> None:
        """Raise DataError if one of the options was given, which ``source`` has no use for."""
        for name in names:
            if getattr(self, name) != getattr(FileOptions, name):
                option = name.replace("_", "-")
                raise DataError(f"--{option}: --data {source} has no use for it; leave it out")

"""Data sets: embedded, from local files, or downloaded; each checked against its checksum."""

from .dataset import DataError, Dataset
from .registry import available, load

__all__ = ["DataError", "Dataset", "available", "load"]

"""Data sets: embedded, from local files, or downloaded; each checked against its checksum."""

from rewire.app.data.dataset import Dataset
from rewire.app.data.sources import available, load

__all__ = ["Dataset", "available", "load"]

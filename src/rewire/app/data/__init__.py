"""Data sets: embedded, from local files, or downloaded; each checked against its checksum."""

from rewire.app.data.dataset import Dataset
from rewire.app.data.download import Progress
from rewire.app.data.options import FileOptions
from rewire.app.data.sources import REGISTERED, available, check, load

__all__ = ["REGISTERED", "Dataset", "FileOptions", "Progress", "available", "check", "load"]

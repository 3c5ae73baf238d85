"""The folder of a run: which files it holds and how they are written."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rewire.data import files

from . import checkpoint
from .config import TrainConfig, parse_config
from .errors import TrainError

CONFIG, METRICS, RESULT, MODEL, REPORT = (
    "config.json",
    "metrics.jsonl",
    "result.json",
    "model.safetensors",
    "report.html",
)


class RunDir:
    """A run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has_run(self) -> bool:
        """Whether a run began here."""
        return any((self.path / name).exists() for name in (CONFIG, METRICS, RESULT, checkpoint.COMMIT))

    def is_finished(self) -> bool:
        """Whether the run here came to its end: its result is the last thing that training writes."""
        return (self.path / RESULT).exists()

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a folder that has a run, unless it is to be replaced."""
        if self.has_run() and not overwrite:
            raise TrainError(
                f"--run-dir {self.path} already has a run; continue it with --resume, "
                "replace it with --overwrite, or choose another folder"
            )
        if not self.has_run() and self.path.is_dir():
            # A run that was killed while it was being replaced may have left files of its own.
            ours = (MODEL, REPORT, checkpoint.COMMIT.partition(".")[0], ".")
            strangers = sorted(p.name for p in self.path.iterdir() if not p.name.startswith(ours))
            if strangers:
                raise TrainError(
                    f"--run-dir {self.path} has other files and no run ({strangers[0]}); choose a new or empty folder"
                )
        if self.has_run() and overwrite and (self.path / CONFIG).exists():
            self.read_config()  # refuses a config.json that is not a run's

    def start(self, config: TrainConfig, *, overwrite: bool) -> None:
        """Make the folder ready for a new run; only files of a former run are ever removed."""
        self.check_free(overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise TrainError(f"--run-dir {self.path}: this is a file, needed is a folder") from None
        # The result goes first: a run that is half removed must never look finished.
        for name in (RESULT, CONFIG, checkpoint.COMMIT, METRICS, MODEL, REPORT):
            files.remove(self.path / name)
        checkpoint.remove_orphans(self.path, keep=None)
        files.remove_unfinished(self.path)
        files.write_atomic(self.path / CONFIG, config.to_json().encode())

    def read_config(self) -> TrainConfig:
        """The options of the run that is here."""
        path = self.path / CONFIG
        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            if self.has_run():
                raise TrainError(f"--resume: {path} is missing; start the run again with --overwrite") from None
            raise TrainError(f"--resume: there is no run in {self.path}; leave --resume out to start one") from None
        except (OSError, UnicodeDecodeError) as error:
            raise TrainError(f"cannot read {path}: {error}") from None
        return parse_config(text, str(path))

    def append_metrics(self, line: str) -> int:
        """Add a line, bring it to the disk, and return the length of the file."""
        path = self.path / METRICS
        try:
            with open(path, "ab") as file:
                files.write_bytes(file, line.encode())
                files.sync_file(file)
                return file.tell()
        except OSError as error:
            error.filename = str(path)
            raise

    def cut_metrics(self, length: int) -> None:
        """Take back the lines written after a checkpoint, whole or torn."""
        path = self.path / METRICS
        if length == 0:
            files.write_atomic(path, b"")
            return
        found = path.stat().st_size if path.exists() else 0
        if found < length:
            raise TrainError(
                f"{path} has {found} bytes, its checkpoint was made at {length}; "
                "the run cannot be resumed; start it again with --overwrite"
            )
        with open(path, "r+b") as file:
            file.truncate(length)
            files.sync_file(file)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write `result.json`."""
        files.write_atomic(self.path / RESULT, (json.dumps(result, indent=2) + "\n").encode())

    def read_result(self) -> dict[str, Any]:
        """Read `result.json`."""
        path = self.path / RESULT
        again = "remove this file and --resume the run, which makes it anew"
        try:
            result = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise TrainError(f"cannot read {path}: {error}; {again}") from None
        keys = ("test_accuracy", "test_loss", "connections", "possible_connections", "density", "seconds", "info")
        lacking = [key for key in keys if not isinstance(result, dict) or key not in result]
        if lacking:
            raise TrainError(f"cannot read {path}: {lacking[0]} is missing; {again}")
        found: dict[str, Any] = result
        return found

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process out of the folder; the system lets go when this one ends, however it ends."""
        try:
            import fcntl
        except ImportError:  # no such lock on Windows
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainError(f"--run-dir {self.path}: another process is training here") from None
            yield
        finally:
            os.close(handle)

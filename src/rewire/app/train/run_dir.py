"""The folder of a run: its lock, and how its files (`rewire.app.run_files`) are written."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rewire.app import run_files
from rewire.app.errors import RunFileError, TrainError
from rewire.app.run_files import (
    CHECKSUMS,
    COMMIT,
    CONFIG,
    INPUTS,
    METRICS,
    MODEL,
    REPORT,
    RESULT,
    TENSORBOARD,
    TRACKING,
    WANDB,
    Prefix,
)
from rewire.app.train import checkpoint
from rewire.app.train.checkpoint import Checkpoint
from rewire.app.train.config import TrainConfig, parse_config
from rewire.storage import files, reading

__all__ = ["CHECKSUMS", "CONFIG", "INPUTS", "METRICS", "MODEL", "REPORT", "RESULT", "RunDir"]


class RunDir:
    """A run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locked = False
        self._until: contextlib.ExitStack | None = None  # lets go of the lock
        # running checksum of the metrics, as this process wrote or verified them
        self._metrics = hashlib.sha256()

    def has_run(self) -> bool:
        """Whether a run began here."""
        return any((self.path / name).exists() for name in (CONFIG, METRICS, RESULT, COMMIT))

    def is_finished(self) -> bool:
        """Whether the run came to its end: training writes the result last."""
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
            written = MODEL, INPUTS, REPORT, CHECKSUMS, TRACKING, TENSORBOARD, WANDB
            ours = *written, COMMIT.partition(".")[0], "."
            strangers = sorted(p.name for p in self.path.iterdir() if not p.name.startswith(ours))
            if strangers:
                raise TrainError(
                    f"--run-dir {self.path} has other files and no run ({strangers[0]}); choose a "
                    "new or empty folder"
                )
        if self.has_run() and overwrite and (self.path / CONFIG).exists():
            self.read_config()  # refuses a config.json that is not a run's

    def start(self, config: TrainConfig, *, overwrite: bool) -> None:
        """Under the lock, make the folder ready; only files of a former run are removed."""
        with self.lock(create=True):
            self.check_free(overwrite=overwrite)
            # The result goes first: a run that is half removed must never look finished.
            for name in (RESULT, CHECKSUMS, CONFIG, COMMIT, METRICS, MODEL, INPUTS, REPORT):
                files.remove(self.path / name)
            checkpoint.remove_orphans(self.path, keep=None)
            files.remove_unfinished(self.path)
            files.write_atomic(self.path / CONFIG, config.to_json().encode())

    def read_config(self) -> TrainConfig:
        """The options of the run that is here."""
        path = self.path / CONFIG
        try:
            text = reading.read_bytes(path, reading.MEBIBYTE)
        except FileNotFoundError:
            if self.has_run():
                raise TrainError(
                    f"--resume: {path} is missing; start the run again with --overwrite"
                ) from None
            raise TrainError(
                f"--resume: there is no run in {self.path}; leave --resume out to start one"
            ) from None
        except OSError as error:
            raise TrainError(f"cannot read {path}: {error.strerror}") from None
        except reading.FileError as error:
            raise TrainError(str(error)) from None
        return parse_config(text, str(path))

    # --- metrics ----------------------------------------------------------------------------------

    def append_metrics(self, line: str) -> Prefix:
        """Add a line, bring it to the disk, and return length and checksum of the file."""
        path = self.path / METRICS
        content = line.encode()
        try:
            with open(path, "ab") as file:
                files.write_bytes(file, content)
                files.sync_file(file)
                length = file.tell()
        except OSError as error:
            error.filename = str(path)
            raise
        self._metrics.update(content)
        return Prefix(length, self._metrics.hexdigest())

    def check_metrics(self, prefix: Prefix) -> None:
        """Refuse metrics that do not begin as they did when a checkpoint was made."""
        try:
            run_files.metrics_prefix(self.path, prefix)
        except RunFileError as error:
            raise TrainError(
                f"{error}; restore it, or start the run again with --overwrite"
            ) from None

    def cut_metrics(self, prefix: Prefix) -> None:
        """Take back the lines written after a checkpoint, whole or torn."""
        self.check_metrics(prefix)
        path = self.path / METRICS
        self._metrics = hashlib.sha256()
        if prefix.bytes == 0:
            files.write_atomic(path, b"")
            return
        self._metrics = files.sha256_prefix(path, prefix.bytes)
        with open(path, "r+b") as file:
            file.truncate(prefix.bytes)
            files.sync_file(file)

    def read_checkpoint(self, config: TrainConfig) -> Checkpoint:
        """The last checkpoint, after everything that it is bound to was verified."""
        saved = checkpoint.load(self.path)
        if saved.config_sha256 != config.sha256():
            raise TrainError(
                f"{self.path}: config.json was changed after the checkpoint was made; restore it, "
                "or start the run again with --overwrite"
            )
        self.check_metrics(saved.metrics)
        return saved

    # --- the result -------------------------------------------------------------------------------

    def write_result(self, result: dict[str, Any], written: Mapping[str, str]) -> None:
        """Write the checksums of all that the run leaves, then `result.json`.

        ``written`` has the sums of the files that belong to it, by name.
        """
        content = (json.dumps(result, indent=2, allow_nan=False) + "\n").encode()
        known = {**written, METRICS: self._metrics.hexdigest()}
        run_files.write_checksums(self.path, str(result["config_sha256"]), content, known)
        files.write_atomic(self.path / RESULT, content)

    def read_result(self) -> dict[str, Any]:
        """The result, after everything that it is bound to was verified."""
        try:
            return run_files.read_result(self.path, self.read_config().sha256())
        except RunFileError as error:
            raise TrainError(
                f"{error}; restore it, or remove {self.path / RESULT} and --resume the run, "
                "which makes model and result anew from the last checkpoint"
            ) from None

    # --- the lock ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, *, create: bool = False) -> Iterator[None]:
        """Keep other processes out of the folder; the system lets go when this one ends, however it
        ends.

        May be nested: what was locked inside stays so until the outermost ends. Without ``create``
        a folder that does not exist is left so, and there is nothing to lock yet.
        """
        if self._until is not None:
            self._take(create)
            yield
            return
        with contextlib.ExitStack() as self._until:
            try:
                self._take(create)
                yield
            finally:
                self._until, self._locked = None, False

    def _take(self, create: bool) -> None:
        """Take the lock, unless this object has it."""
        if self._locked or not (create or self.path.exists()):
            return
        if create:
            with contextlib.suppress(FileExistsError):  # it is a file
                self.path.mkdir(parents=True, exist_ok=True)
        if not self.path.is_dir():
            raise TrainError(f"--run-dir {self.path}: this is a file, needed is a folder")
        assert self._until is not None
        try:
            self._until.enter_context(files.lock_folder(self.path))
        except files.LockedError:
            raise TrainError(f"--run-dir {self.path}: another process is training here") from None
        self._locked = True

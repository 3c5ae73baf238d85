"""Checkpoints: tensors in a safetensors file, everything else in `checkpoint.json`, which names
that file.

`checkpoint.json` is the commit point. It is replaced, in one step, only after the tensors it names
are on the disk, and only then are older tensors removed: whenever a run is killed, the folder holds
one whole checkpoint. Nothing is pickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rewire.app import run_files
from rewire.app.errors import RunFileError, TrainError
from rewire.app.run_files import COMMIT, FORMAT, Prefix
from rewire.storage import files, reading
from rewire.storage import tensors as tensor_file
from rewire.storage.nested import flatten, unflatten

ADVICE = "the run cannot be resumed; start it again with --overwrite"
TENSORS = "checkpoint-*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A run at one moment; `state` holds tensors, numbers, strings, None, nested."""

    epoch: int
    step: int
    config_sha256: str
    metrics: Prefix
    seconds: float
    info: dict[str, Any]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; at every moment of it the previous one or the new one can be loaded."""
    tensors: dict[str, Tensor] = {}
    skeleton = flatten(checkpoint.state, tensors)
    name = f"checkpoint-{checkpoint.step}.safetensors"
    if name == committed_file(folder):  # the one file that must not be touched before the commit
        name = f"checkpoint-{checkpoint.step}-again.safetensors"
    written = tensor_file.write(folder / name, tensors)
    commit = {
        "format": FORMAT,
        "file": name,
        "sha256": written,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "config_sha256": checkpoint.config_sha256,
        "metrics_bytes": checkpoint.metrics.bytes,
        "metrics_sha256": checkpoint.metrics.sha256,
        "seconds": checkpoint.seconds,
        "info": checkpoint.info,
        "state": skeleton,
    }
    commit["this_sha256"] = run_files.own_sum(commit)
    files.write_atomic(folder / COMMIT, (json.dumps(commit) + "\n").encode())
    remove_orphans(folder, keep=name)


def exists(folder: Path) -> bool:
    """Whether a checkpoint was ever committed here."""
    return (folder / COMMIT).exists()


def committed_file(folder: Path) -> str | None:
    """Name of the tensor file of the checkpoint in `folder`; None without one."""
    try:
        name = reading.read_json(folder / COMMIT, finite=False)["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def remove_orphans(folder: Path, keep: str | None) -> None:
    """Remove tensor files that no commit names, left by older checkpoints or by a killed write."""
    for path in folder.glob(TENSORS):
        if path.name != keep:
            files.remove(path)


def load(folder: Path) -> Checkpoint:
    """Load the committed checkpoint, its checksums verified. Memory: twice its size."""
    try:
        commit = run_files.read_commit(folder)
    except RunFileError as error:
        raise TrainError(f"{error}; {ADVICE}") from None
    path = folder / commit["file"]
    try:
        packed = reading.read_bytes(path)
    except OSError as error:
        raise TrainError(f"cannot read checkpoint {path}: {error.strerror}; {ADVICE}") from None
    except reading.FileError as error:
        raise TrainError(f"{error}; {ADVICE}") from None
    found = files.sha256_bytes(packed)
    if found != commit["sha256"]:
        raise TrainError(
            f"checkpoint {path} is damaged: sha256 {found} ({len(packed)} bytes), expected "
            f"{commit['sha256']}; {ADVICE}"
        )
    try:
        state = unflatten(commit["state"], tensor_file.parse(packed, str(path))[0])
    except (KeyError, TypeError, ValueError) as error:
        raise TrainError(
            f"checkpoint {path} does not fit {folder / COMMIT} ({error}); {ADVICE}"
        ) from None
    return Checkpoint(
        epoch=commit["epoch"],
        step=commit["step"],
        config_sha256=commit["config_sha256"],
        metrics=Prefix(commit["metrics_bytes"], commit["metrics_sha256"]),
        seconds=float(commit["seconds"]),
        info=commit["info"],
        state=state,
    )

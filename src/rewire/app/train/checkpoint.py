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


def flatten(value: Any, tensors: dict[str, Tensor], path: str = "state") -> Any:
    """Put every tensor of `value` into `tensors`, a reference in its place, and return what JSON
    can hold.

    Dicts with keys that are no strings (optimizer state) and tuples come back as they were.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach()  # no copy: it is written before anything can change it
        return {"$tensor": path}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: flatten(item, tensors, f"{path}.{key}") for key, item in value.items()}
        return {
            "$dict": [[key, flatten(item, tensors, f"{path}.{key}")] for key, item in value.items()]
        }
    if isinstance(value, list | tuple):
        items = [flatten(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} cannot be put into a checkpoint")


def unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        if "$dict" in value:
            return {key: unflatten(item, tensors) for key, item in value["$dict"]}
        if "$tuple" in value:
            return tuple(unflatten(item, tensors) for item in value["$tuple"])
        return {key: unflatten(item, tensors) for key, item in value.items()}
    return value


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

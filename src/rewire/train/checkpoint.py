"""Checkpoints: tensors in a safetensors file, everything else in `checkpoint.json`, which names that file.

`checkpoint.json` is the commit point. It is replaced, in one step, only after the tensors it names are on the
disk, and only then are older tensors removed: whenever a run is killed, the folder holds one whole
checkpoint. Nothing is pickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rewire.data import files

from .errors import TrainError

FORMAT = 1
COMMIT = "checkpoint.json"
TENSORS = "checkpoint-*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A run at one moment: `state` is nested dicts and lists of tensors, numbers, strings and None."""

    epoch: int
    step: int
    config_sha256: str
    metrics_bytes: int
    seconds: float
    info: dict[str, Any]
    state: dict[str, Any]


def flatten(value: Any, tensors: dict[str, Tensor], path: str = "state") -> Any:
    """Put every tensor of `value` into `tensors`, a reference in its place, and return what JSON can hold.

    Dicts with keys that are no strings (optimizer state) and tuples come back as they were.
    """
    if isinstance(value, Tensor):
        # A copy of its own: safetensors refuses tensors that share memory or are not contiguous.
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$tensor": path}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: flatten(item, tensors, f"{path}.{key}") for key, item in value.items()}
        return {"$dict": [[key, flatten(item, tensors, f"{path}.{key}")] for key, item in value.items()]}
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
    packed = safetensors.torch.save(tensors)
    name = f"checkpoint-{checkpoint.step}.safetensors"
    if name == committed_file(folder):  # the one file that must not be touched before the commit
        name = f"checkpoint-{checkpoint.step}-again.safetensors"
    files.write_atomic(folder / name, packed)
    commit = {
        "format": FORMAT,
        "file": name,
        "sha256": files.sha256_bytes(packed),
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "config_sha256": checkpoint.config_sha256,
        "metrics_bytes": checkpoint.metrics_bytes,
        "seconds": checkpoint.seconds,
        "info": checkpoint.info,
        "state": skeleton,
    }
    commit["this_sha256"] = _own_sum(commit)
    files.write_atomic(folder / COMMIT, (json.dumps(commit) + "\n").encode())
    remove_orphans(folder, keep=name)


def _own_sum(commit: dict[str, Any]) -> str:
    """Checksum of all of `checkpoint.json` but the checksum itself."""
    rest = {key: value for key, value in commit.items() if key != "this_sha256"}
    return files.sha256_bytes(json.dumps(rest, sort_keys=True).encode())


def exists(folder: Path) -> bool:
    """Whether a checkpoint was ever committed here."""
    return (folder / COMMIT).exists()


def committed_file(folder: Path) -> str | None:
    """Name of the tensor file of the checkpoint in `folder`; None without one."""
    try:
        name = json.loads((folder / COMMIT).read_text("utf-8"))["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def remove_orphans(folder: Path, keep: str | None) -> None:
    """Remove tensor files that no commit names, left by older checkpoints or by a killed write."""
    for path in folder.glob(TENSORS):
        if path.name != keep:
            files.remove(path)


def read_commit(folder: Path) -> dict[str, Any]:
    """`checkpoint.json`, checked for form."""
    path = folder / COMMIT
    advice = "the run cannot be resumed; start it again with --overwrite"
    try:
        commit = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise TrainError(f"{path} is damaged ({error}); {advice}") from None
    wanted = {"format": int, "file": str, "sha256": str, "epoch": int, "step": int, "config_sha256": str}
    wanted |= {"metrics_bytes": int, "info": dict, "state": dict}
    if not isinstance(commit, dict):
        raise TrainError(f"{path} is damaged (not an object); {advice}")
    for key, kind in wanted.items():
        if not isinstance(commit.get(key), kind):
            raise TrainError(f"{path} is damaged ({key!r} is missing or of the wrong kind); {advice}")
    if commit["format"] != FORMAT:
        raise TrainError(f"{path} has format {commit['format']}, this version of rewire reads {FORMAT}")
    if (found := _own_sum(commit)) != commit.get("this_sha256"):
        raise TrainError(
            f"checkpoint {path} is damaged: sha256 {found}, expected {commit.get('this_sha256')}; {advice}"
        )
    if Path(commit["file"]).name != commit["file"]:
        raise TrainError(f"{path} is damaged (it names {commit['file']!r}, not a file beside it); {advice}")
    return commit


def load(folder: Path) -> Checkpoint:
    """Load the committed checkpoint, its checksum verified."""
    commit = read_commit(folder)
    path = folder / commit["file"]
    advice = "the run cannot be resumed; start it again with --overwrite"
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise TrainError(f"cannot read checkpoint {path}: {error.strerror}; {advice}") from None
    found = files.sha256_bytes(packed)
    if found != commit["sha256"]:
        raise TrainError(
            f"checkpoint {path} is damaged: sha256 {found} ({len(packed)} bytes), expected {commit['sha256']}; {advice}"
        )
    try:
        state = unflatten(commit["state"], safetensors.torch.load(packed))
    except (SafetensorError, KeyError) as error:
        raise TrainError(f"checkpoint {path} does not fit {folder / COMMIT} ({error}); {advice}") from None
    return Checkpoint(
        epoch=commit["epoch"],
        step=commit["step"],
        config_sha256=commit["config_sha256"],
        metrics_bytes=commit["metrics_bytes"],
        seconds=float(commit.get("seconds", 0.0)),
        info=commit["info"],
        state=state,
    )

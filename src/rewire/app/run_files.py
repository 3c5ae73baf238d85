"""What the files of a run directory hold, how they are bound together, and how they are read.

    config.json                 the options of the run
    metrics.jsonl               one line an epoch
    checkpoint.json             the last checkpoint but for its tensors, and the sums of:
                                itself, its tensors, the options, the metrics up to it
    checkpoint-N.safetensors    its tensors
    model.safetensors           the finished network
    inputs.safetensors          how inputs and targets were standardised, if they were
    checksums.json              before the result: sums of all other files
    result.json                 the scores; the last to be written, so a run that has it is finished
    report.html                 made of all this, and never read
    tracking.json               what trackers know of the run (rewire train --log), and beside it
                                the folders that they write

Every reader checks these sums and refuses a folder whose files were changed or are of several runs,
in one line that names the file. Free to be changed are `report.html`, files of other names, and in
`config.json` the layout and the options that decide no number (`FREE`). The checkpoint of a
finished run may be deleted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewire.app.errors import RunFileError
from rewire.storage import files, reading
from rewire.storage.reading import FileError

CONFIG, METRICS, RESULT, MODEL, INPUTS, REPORT, CHECKSUMS, COMMIT = (
    "config.json",
    "metrics.jsonl",
    "result.json",
    "model.safetensors",
    "inputs.safetensors",
    "report.html",
    "checksums.json",
    "checkpoint.json",
)
TRACKING, TENSORBOARD, WANDB = "tracking.json", "tensorboard", "wandb"

#: Options that decide no number of a run, so that `config.json` may be changed there.
FREE = ("data_dir", "mirror", "checkpoint_every", "threads")

#: Version of `checkpoint.json` and `checksums.json`.
FORMAT = 2

_LINE = 16 * reading.MEBIBYTE  # most bytes of one line of metrics

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(gt=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sum = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class Layer(_Part):
    """A layer that training begins with."""

    name: str
    outputs: Size
    inputs: Size
    connections: Count
    budget: Count | None = None


class Samples(_Part):
    """Samples of each part of the data set."""

    train: Count
    validation: Count
    test: Count


class Info(_Part):
    """What a run is about."""

    starts_dense: bool = False
    score: Literal["accuracy", "r2"] = "accuracy"
    layers: Annotated[list[Layer], Field(min_length=1)]
    image_shape: list[Size] | None = None
    samples: Samples


class Epoch(_Part):
    """One line of `metrics.jsonl`."""

    epoch: Size
    train_loss: Finite
    train_accuracy: Share | None = None
    train_r2: Finite | None = None
    validation_loss: Finite | None
    validation_accuracy: Share | None = None
    validation_r2: Finite | None = None
    connections: list[Count]
    turnover: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    units: list[Count] = []


class SizedLayer(_Part):
    """A layer of a network that is compared."""

    name: str
    kind: str
    active_units: Count
    connections: Count
    multiply_adds: Count


class Network(_Part):
    """One of two networks that are compared."""

    parameters: Count
    bytes: Count
    file_bytes: Count
    multiply_adds: Count
    layers: list[SizedLayer]


class Timing(_Part):
    """Time of inference of both networks."""

    samples: Count
    threads: Count
    rounds: Count
    before_ms: Finite
    after_ms: Finite
    speedup: Finite
    quartiles: Annotated[list[Finite], Field(min_length=2, max_length=2)]


class Result(_Part):
    """`result.json`."""

    test_accuracy: Share | None = None
    test_r2: Finite | None = None
    test_loss: Finite
    connections: Count
    possible_connections: Size
    density: Share
    seconds: Finite
    steps: Count
    versions: dict[str, str]
    info: Info
    before: Network | None = None
    after: Network | None = None
    inference: Timing | None = None


class Commit(_Part):
    """`checkpoint.json`."""

    format: int
    file: str
    sha256: Sum
    epoch: Count
    step: Count
    config_sha256: Sum
    metrics_bytes: Count
    metrics_sha256: Sum
    seconds: Finite
    info: Info
    state: dict[str, Any]
    this_sha256: Sum


class Checksums(_Part):
    """`checksums.json`: sums by name of the file, and that of the options that decide numbers."""

    format: int
    config_sha256: Sum
    files: dict[str, Sum]


class Prefix(NamedTuple):
    """The beginning of `metrics.jsonl`: its length in bytes and its sha256."""

    bytes: int
    sha256: str


EMPTY = Prefix(0, files.sha256_bytes(b""))

_Model = TypeVar("_Model", bound=_Part)


def refuse(path: Path, reason: str) -> NoReturn:
    """Raise the error for a file whose content is wrong."""
    raise RunFileError(f"{path} is damaged: {reason}")


def check(value: Any, kind: type[_Model], path: Path) -> _Model:
    """``value``, parsed from ``path``, as a ``kind``."""
    if not isinstance(value, dict):
        refuse(path, "not an object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))[:100]
        if first["type"] == "missing":
            refuse(path, f"{where!r} is missing")
        refuse(path, f"{where!r} is {str(first['input'])[:100]!r}; {first['msg'].lower()}")


def read_object(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = reading.read_json(path, finite=finite)
    except OSError as error:
        raise RunFileError(f"cannot read {path}: {error.strerror}") from None
    except FileError as error:
        raise RunFileError(str(error)) from None
    if not isinstance(value, dict):
        refuse(path, "not an object")
    return value


# --- sums -----------------------------------------------------------------------------------------


def config_sum(options: Mapping[str, Any]) -> str:
    """Checksum over all options that decide the numbers of a run."""
    decisive = {name: value for name, value in options.items() if name not in FREE}
    return files.sha256_bytes(json.dumps(decisive, sort_keys=True).encode())


def own_sum(commit: dict[str, Any]) -> str:
    """Checksum of all of `checkpoint.json` but the checksum itself."""
    rest = {key: value for key, value in commit.items() if key != "this_sha256"}
    return files.sha256_bytes(json.dumps(rest, sort_keys=True).encode())


def read_commit(folder: Path) -> dict[str, Any]:
    """`checkpoint.json`, verified by itself; the files that it names are not."""
    path = folder / COMMIT
    commit = read_object(path, finite=False)
    _check_format(commit, path)
    check(commit, Commit, path)
    if (found := own_sum(commit)) != commit["this_sha256"]:
        raise RunFileError(f"{path} is damaged: sha256 {found}, expected {commit['this_sha256']}")
    if Path(commit["file"]).name != commit["file"]:
        refuse(path, f"it names {commit['file']!r}, not a file beside it")
    return commit


def _check_format(value: dict[str, Any], path: Path) -> None:
    if (found := value.get("format")) != FORMAT:
        if type(found) is not int:
            refuse(path, "'format' is missing or no number")
        raise RunFileError(f"{path} has format {found}, this version of rewire reads {FORMAT}")


def metrics_prefix(folder: Path, wanted: Prefix) -> None:
    """Refuse metrics that do not begin as they did when the checkpoint was made."""
    path = folder / METRICS
    try:
        size = path.stat().st_size if path.exists() else 0
        if size < wanted.bytes:
            raise RunFileError(
                f"{path} has {size} bytes, its checkpoint was made at {wanted.bytes}"
            )
        found = (
            files.sha256_prefix(path, wanted.bytes).hexdigest() if wanted.bytes else EMPTY.sha256
        )
    except OSError as error:
        raise RunFileError(f"cannot read {path}: {error.strerror}") from None
    if found != wanted.sha256:
        raise RunFileError(
            f"{path} was changed after the checkpoint was made: sha256 of its first {wanted.bytes} "
            f"bytes is {found}, expected {wanted.sha256}"
        )


def write_checksums(folder: Path, config_sha256: str, result: bytes, known: dict[str, str]) -> None:
    """Write `checksums.json` of a run that ``result`` is about to finish."""
    commit = read_commit(folder)
    names = (METRICS, MODEL, COMMIT, commit["file"])
    sums = {name: known.get(name) or files.sha256_file(folder / name) for name in names} | known
    value = {
        "format": FORMAT,
        "config_sha256": config_sha256,
        "files": sums | {RESULT: files.sha256_bytes(result)},
    }
    files.write_atomic(folder / CHECKSUMS, (json.dumps(value, indent=2) + "\n").encode())


def read_result(folder: Path, config_sha256: str) -> dict[str, Any]:
    """`result.json` of a finished run, after all that it is bound to was verified.

    ``config_sha256`` is the sum of the options in `config.json`. Raises RunFileError.
    """
    path = folder / CHECKSUMS
    value = read_object(path)
    _check_format(value, path)
    sums = check(value, Checksums, path)
    lacking = [name for name in (METRICS, MODEL, RESULT) if name not in sums.files]
    if lacking:
        refuse(path, f"it has no sum of {lacking[0]}")
    if sums.config_sha256 != config_sha256:
        raise RunFileError(
            f"{folder / CONFIG} was changed after the run was finished, or is of another run"
        )
    for name, wanted in sums.files.items():
        _check_sum(folder, name, wanted)
    path = folder / RESULT
    result = read_object(path)
    checked = check(result, Result, path)
    if f"test_{checked.info.score}" not in result:
        refuse(path, f"'test_{checked.info.score}' is missing")
    before, after = checked.before, checked.after
    if before is not None and after is not None and len(before.layers) != len(after.layers):
        refuse(path, f"'before' has {len(before.layers)} layers, 'after' has {len(after.layers)}")
    return result


def _check_sum(folder: Path, name: str, wanted: str) -> None:
    if Path(name).name != name:
        refuse(folder / CHECKSUMS, f"it names {name[:100]!r}, not a file beside it")
    path = folder / name
    if name.startswith("checkpoint") and not path.exists():
        return  # the checkpoint of a finished run may be deleted
    try:
        if not path.is_file() and path.exists():
            raise RunFileError(f"{path} is no ordinary file")
        found = files.sha256_file(path)
    except OSError as error:
        raise RunFileError(f"cannot read {path}: {error.strerror}") from None
    if found != wanted:
        raise RunFileError(
            f"{path} is damaged: it was changed after the run was finished or is of another run, "
            f"sha256 {found}, expected {wanted}"
        )


# --- metrics --------------------------------------------------------------------------------------


def read_metrics(folder: Path, length: int | None = None) -> list[dict[str, Any]]:
    """The lines of the first ``length`` bytes of `metrics.jsonl` (None: all of them)."""
    path = folder / METRICS
    lines: list[dict[str, Any]] = []
    left = length
    try:
        with open(path, "rb") as file:
            while left is None or left > 0:
                line = file.readline(_LINE if left is None else min(_LINE, left))
                if not line:
                    break
                left = None if left is None else left - len(line)
                if not line.endswith(b"\n"):
                    refuse(path, f"line {len(lines) + 1} is cut short")
                value = reading.parse_json(line, f"{path}, line {len(lines) + 1},")
                check(value, Epoch, path)
                lines.append(value)
                if value["epoch"] != len(lines):
                    refuse(path, f"line {len(lines)} is of epoch {value['epoch']}")
    except OSError as error:
        raise RunFileError(f"cannot read {path}: {error.strerror}") from None
    except FileError as error:
        raise RunFileError(str(error)) from None
    return lines


def check_together(
    folder: Path, lines: Sequence[Mapping[str, Any]], info: Mapping[str, Any]
) -> None:
    """Refuse metrics that lack a layer's number, or validation scores in some epochs."""
    layers, score = len(info["layers"]), info.get("score", "accuracy")
    for line in lines:
        if line.get(f"train_{score}") is None:
            refuse(folder / METRICS, f"epoch {line['epoch']} has no train_{score}")
        for key in ("validation_loss", f"validation_{score}"):
            if key not in line:
                refuse(folder / METRICS, f"epoch {line['epoch']} has no {key}")
            if (line[key] is None) != (lines[0]["validation_loss"] is None):
                refuse(
                    folder / METRICS,
                    f"epoch {line['epoch']} has {key} {line[key]}, unlike the first",
                )
        for key in ("connections", "turnover", "units"):
            if len(line.get(key) or ()) not in ((layers,) if key != "units" else (0, layers)):
                refuse(folder / METRICS, f"epoch {line['epoch']} has no {key} of {layers} layers")

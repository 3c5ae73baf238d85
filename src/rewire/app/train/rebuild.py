"""The network of a finished run, made again from its folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from rewire.app import run_files
from rewire.app.errors import RunFileError
from rewire.app.models import Signature
from rewire.app.run_files import CONFIG, INPUTS, MODEL
from rewire.app.train.config import parse_config
from rewire.app.train.model import Network
from rewire.nn.convert.restore import load_state
from rewire.nn.surgery import load_resized
from rewire.storage import reading
from rewire.storage import tensors as tensor_file

__all__ = ["load_network"]


def load_network(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network of the finished run in ``folder``, in eval mode, and how to scale its inputs.

    The second is empty where inputs were left as they are; else ``(x - inputs.mean) *
    inputs.factor`` is what the network reads, and an output of a regression is
    ``output / targets.factor + targets.mean``.

    Raises `RunFileError` for a run that is not finished, files that were changed, and a network of
    one's own that is not the one that was trained.
    """
    config_path = folder / CONFIG
    try:
        text = reading.read_bytes(config_path, reading.MEBIBYTE)
    except OSError as error:
        raise RunFileError(f"cannot read {config_path}: {error.strerror}") from None
    config = parse_config(text, str(config_path))
    info = run_files.read_result(folder, config.sha256())["info"]
    state = _tensors(folder / MODEL)
    given = info["signature"]
    signature = Signature(
        tuple(given["shape"]), given["outputs"], given["each_step"], given["tokens"]
    )
    network = Network.of(config, signature, info["width"])
    model = network.make(None)
    try:
        _load(model, state)
    except (ValueError, RuntimeError, KeyError) as error:
        raise RunFileError(
            f"{folder / MODEL} does not fit --model {config.model}: {reading.brief(error)}"
        ) from None
    scaling = _tensors(folder / INPUTS) if (folder / INPUTS).exists() else {}
    return model.eval(), scaling


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return tensor_file.read(path)[0]
    except OSError as error:
        raise RunFileError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise RunFileError(f"cannot read {path}: {reading.brief(error)}") from None


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state of the network, whose layers may have become sparse or smaller."""
    if any(key.endswith(".rows") for key in state):
        load_state(model, state, resize=True)
    else:
        load_resized(model, state)

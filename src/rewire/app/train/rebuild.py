"""The network of a finished run, made again from its folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import rewire
from rewire.app import run_files
from rewire.app.errors import RunFileError
from rewire.app.models import Signature
from rewire.app.run_files import CONFIG, INPUTS, MODEL
from rewire.app.train.config import parse_config
from rewire.app.train.model import Network
from rewire.nn import SparseWeight, sparse_weights
from rewire.nn.convert.cut import dense_weights
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
    own = {name for name, _ in sparse_weights(model)}
    sparse = {
        name: len(state[f"{name}.values"])
        for name, *_ in dense_weights(model)
        if f"{name}.rows" in state
    }
    if sparse:
        rewire.sparsify(
            model, connections=dict.fromkeys(sparse, 1), generator=torch.Generator().manual_seed(0)
        )
    if own or sparse:
        for name, pool in sparse_weights(model):
            shape = tuple(state[f"{name}.shape"].tolist())
            if shape != tuple(pool.shape):
                _resize(model, name, state, shape)
        model.load_state_dict(state)
    else:
        load_resized(model, state)


def _resize(model: nn.Module, name: str, state: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    """Put a pool of another shape in the place of one: its layer lost units before it was cut."""
    parent, _, leaf = name.rpartition(".")
    layer = model.get_submodule(parent)
    rows, cols = state[f"{name}.rows"], state[f"{name}.cols"]
    active = rows >= 0
    made = SparseWeight.from_coo(
        torch.Size(shape), rows[active].long(), cols[active].long(), state[f"{name}.values"][active]
    )
    setattr(layer, leaf, made)

"""The network that a finished run has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewire.app.errors import RunFileError, TrainError
from rewire.app.models.spec import Signature
from rewire.app.run_files import MODEL
from rewire.app.train.command import load_data
from rewire.app.train.config import TrainConfig
from rewire.app.train.model import Network
from rewire.app.train.prepared import prepare
from rewire.app.train.run_dir import RunDir
from rewire.nn import SparseLinear, SparseWeight
from rewire.storage import tensors as tensor_file

__all__ = ["load"]


def load(folder: Path) -> tuple[nn.Module, Tensor]:
    """The trained network of the run in ``folder``, after its files were verified, and an example
    of what it reads, one sample.

    A stack of linear layers is made of the file alone, because some methods end with fewer units
    than the options say; other networks are made as the run made them, from its options and data.
    Raises `TrainError` where there is no finished run, `RunFileError` for a file that does not fit.
    """
    place = RunDir(folder)
    if not place.has_run():
        raise TrainError(f"there is no run in {folder}")
    if not place.is_finished():
        raise TrainError(
            f"the run in {folder} is not finished: go on with rewire train --resume --run-dir"
        )
    place.read_result()  # checks the sums of all files
    config = place.read_config()
    state, _ = tensor_file.read(folder / MODEL)
    try:
        if config.model == "mlp":
            model = _stack(state)
            first: Any = model[0]
            return model, torch.zeros(1, first.in_features)
        return _made(config, state)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RunFileError(f"{folder / MODEL} does not fit the options: {reason}") from None


def _made(config: TrainConfig, state: dict[str, Tensor]) -> tuple[nn.Module, Tensor]:
    dataset = load_data(config)
    x = prepare(config, dataset).test[0][:1]
    if not isinstance(x, Tensor):
        raise TrainError(f"--model {config.model} reads more than one tensor: export it in Python")
    signature = Signature(dataset.shape, dataset.outputs, dataset.each_step, dataset.tokens)
    network = Network.of(config, signature)
    sparse = [state[f"{n}.values"].numel() for n in network.names if f"{n}.values" in state]
    model = network.make(sparse if len(sparse) == len(network.names) else None)
    model.load_state_dict(state)
    return model, x


def _stack(state: dict[str, Tensor]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for number in sorted({int(key.split(".")[0]) for key in state}):
        modules += [nn.ReLU()] if modules else []
        bias = state.get(f"{number}.bias")
        values = state.get(f"{number}.weight.values")
        if values is None:
            weight = state[f"{number}.weight"]
            layer = nn.utils.skip_init(
                nn.Linear, weight.shape[1], weight.shape[0], bias is not None
            )
            layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
            modules.append(layer)
            continue
        rows, cols = (state[f"{number}.weight.{name}"] for name in ("rows", "cols"))
        there = rows >= 0
        shape = state[f"{number}.weight.shape"].tolist()
        pool = SparseWeight.from_coo(shape, rows[there], cols[there], values[there])
        modules.append(SparseLinear.from_weight(pool, bias))
    return nn.Sequential(*modules)

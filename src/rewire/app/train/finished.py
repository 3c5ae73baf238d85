"""The network that a finished run has left."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from rewire.app.errors import RunFileError, TrainError
from rewire.app.run_files import MODEL
from rewire.app.train.run_dir import RunDir
from rewire.nn import SparseLinear, SparseWeight
from rewire.storage import tensors as tensor_file

__all__ = ["load"]


def load(folder: Path) -> nn.Sequential:
    """The trained network of the run in ``folder``, after its files were verified.

    It is made of the file alone, because some methods end with fewer units than the options say.
    Raises `TrainError` where there is no finished run.
    """
    place = RunDir(folder)
    if not place.has_run():
        raise TrainError(f"there is no run in {folder}")
    if not place.is_finished():
        raise TrainError(
            f"the run in {folder} is not finished: go on with rewire train --resume --run-dir"
        )
    place.read_result()  # checks the sums of all files
    state, _ = tensor_file.read(folder / MODEL)
    try:
        return _network(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise RunFileError(f"{folder / MODEL} holds no such network: {error}") from None


def _network(state: dict[str, Tensor]) -> nn.Sequential:
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

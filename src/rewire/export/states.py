"""A ``state_dict`` in a file: with sparse weights, or dense; and those of other programs."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from rewire.export.lists.entries import State, state_of
from rewire.nn.convert.densify import densify
from rewire.nn.weight.listing import sparse_weights
from rewire.storage import reading, tensors
from rewire.storage.reading import FileError

__all__ = [
    "DENSE_LIMIT",
    "check_dense",
    "dense_twin",
    "read_checkpoint",
    "read_safetensors",
    "write_dense",
    "write_sparse",
]

#: Bytes of the dense form of a weight above which a dense format is refused unless one insists.
DENSE_LIMIT = 256 * reading.MEBIBYTE


def write_sparse(model: nn.Module, path: Path) -> int:
    """Write the state_dict, sparse weights as slots; returns the bytes."""
    tensors.write(path, state_of(model))
    return path.stat().st_size


def check_dense(model: nn.Module, dense: bool) -> None:
    """Raise ValueError for a weight whose dense form has more than `DENSE_LIMIT` bytes, unless
    ``dense`` allows all.
    """
    for name, weight in () if dense else sparse_weights(model):
        size = weight.size * weight.values.element_size()
        if size > DENSE_LIMIT:
            raise ValueError(
                f"{name} would have {size:,} bytes as a dense array, and more than {DENSE_LIMIT:,} "
                "are written only on demand: give dense=True, on the command line --dense, or "
                "choose a format of O(K)"
            )


def dense_twin(model: nn.Module, dense: bool) -> nn.Module:
    """A copy of the model with dense layers, in eval mode. Raises ValueError as `check_dense`."""
    check_dense(model, dense)
    return densify(copy.deepcopy(model)).eval()


def write_dense(model: nn.Module, path: Path, *, dense: bool = False) -> int:
    """Write the state_dict of the dense twin, which has the names and shapes of `torch.nn`'s
    layers; returns the bytes. O(M) memory, see `check_dense`.
    """
    state_of(model)
    tensors.write(path, dict(dense_twin(model, dense).state_dict()))
    return path.stat().st_size


def read_safetensors(path: Path) -> State:
    """The tensors of a safetensors file. Raises OSError or FileError."""
    return tensors.read(path)[0]


def read_checkpoint(path: Path) -> State:
    """The state_dict in a file of `torch.save`, by its loader that runs no code of the file.

    A checkpoint that has the state under "state_dict" or "model" will do. Raises OSError or
    FileError.
    """
    content = reading.read_bytes(path)
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise FileError(
            f"{path} has more than tensors in it, or is damaged, and loading it could run code: "
            "save model.state_dict() alone, best with safetensors.torch.save_file"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a file can hold anything
        raise FileError(f"{path} is damaged: {reading.brief(error)}") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise FileError(f"{path} holds no state_dict, which is a dict of tensors by name")
    return {str(name): tensor.detach() for name, tensor in found.items()}

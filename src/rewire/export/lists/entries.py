"""The connections of a weight as lists, taken out of a state and put back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rewire import topology
from rewire.nn.weight.listing import sparse_weights

__all__ = [
    "Entries",
    "State",
    "array_of",
    "entries_of",
    "others_of",
    "put",
    "sparse_names",
    "state_of",
]

#: A state_dict; the sparse weight NAME has the entries NAME.values, NAME.rows, NAME.cols and
#: NAME.shape.
State = dict[str, Tensor]

_PARTS = ("values", "rows", "cols", "shape", "limits", "allowed", "frozen")


class Entries(NamedTuple):
    """The connections of a weight, sorted by (row, col).

    ``shape`` is that of the dense weight, output dimension first. ``rows`` and ``cols`` are int64
    positions in the weight as a matrix, of which all dimensions but the first are the columns.
    """

    shape: tuple[int, ...]
    rows: Tensor
    cols: Tensor
    values: Tensor

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.shape[0], math.prod(self.shape[1:])

    def row_ptr(self) -> Tensor:
        """Where each row begins in the lists; int64, length rows + 1."""
        counts = torch.bincount(self.rows, minlength=self.shape[0])
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def state_of(model: nn.Module) -> State:
    """The ``state_dict`` of a model with sparse weights. Raises ValueError if it has none."""
    if not any(sparse_weights(model)):
        raise ValueError(
            "the model has no sparse weights: make it sparse with rewire.sparsify, and export it "
            "before rewire.freeze"
        )
    return dict(model.state_dict())


def sparse_names(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the sparse weights of a state, which nobody has checked."""
    names = (key.removesuffix(".rows") for key in state if key.endswith(".rows"))
    return [name for name in names if f"{name}.values" in state]


def entries_of(state: Mapping[str, Tensor]) -> dict[str, Entries]:
    """The sparse weights of a state by name, checked.

    Raises `TopologyError` (a ValueError) for a position that is outside or occurs twice, and for
    lists of different lengths. O(K) memory, whatever the shape.
    """
    found: dict[str, Entries] = {}
    for name in sparse_names(state):
        try:
            rows, cols, values = (state[f"{name}.{part}"] for part in ("rows", "cols", "values"))
            shape = tuple(int(n) for n in state[f"{name}.shape"].flatten().tolist())
        except KeyError as error:
            raise topology.TopologyError(f"{name} is incomplete: there is no {error}") from None
        if not rows.shape == cols.shape == values.shape or rows.dim() != 1:
            raise topology.TopologyError(
                f"{name}: rows, cols and values must be 1-D and equally long, not "
                f"{tuple(rows.shape)}, {tuple(cols.shape)} and {tuple(values.shape)}"
            )
        if not values.is_floating_point() or any(
            t.is_floating_point() or t.is_complex() for t in (rows, cols)
        ):
            raise topology.TopologyError(f"{name}: rows and cols must be integers, values floats")
        rows, cols, values = rows.cpu().long(), cols.cpu().long(), values.detach().cpu()
        slots = _order(name, rows, cols, shape)
        found[name] = Entries(shape, rows[slots], cols[slots], values[slots])
    return found


def _order(name: str, rows: Tensor, cols: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The slots with a connection, sorted by (row, col); refuses invalid ones."""
    size = _size(name, shape)
    if math.prod(size) >= 2**63:
        raise topology.TopologyError(f"{name}: no weight has the shape {shape}")
    outside = (rows < 0) | (rows >= size[0]) | (cols < 0) | (cols >= size[1])
    outside &= (rows != -1) | (cols != -1)  # an empty slot
    slots = (rows >= 0).nonzero().flatten()
    slots = slots[cols[slots].argsort(stable=True)]
    slots = slots[rows[slots].argsort(stable=True)]
    same = (rows[slots].diff() == 0) & (cols[slots].diff() == 0)
    for wrong, what in (
        (outside.nonzero().flatten(), f"is outside the {size} matrix"),
        (slots[1:][same], "occurs more than once"),
    ):
        if wrong.numel():
            place = int(rows[wrong[0]]), int(cols[wrong[0]])
            raise topology.TopologyError(f"{name}: connection {place} {what}")
    return slots


def _size(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight; `TopologyError` for a shape that no weight has."""
    try:
        return topology.matrix_size(shape)
    except ValueError as error:
        raise topology.TopologyError(f"{name}: {error}") from None


def others_of(state: Mapping[str, Tensor]) -> State:
    """What is in a state besides its sparse weights."""
    own = {f"{name}.{part}" for name in sparse_names(state) for part in _PARTS}
    return {key: tensor.detach() for key, tensor in state.items() if key not in own}


def put(state: State, name: str, entries: Entries) -> None:
    """Add a sparse weight to a state; one without connections gets an empty slot.

    Raises `TopologyError` for a shape that no weight has; `entries_of` checks the rest.
    """
    rows, cols = _size(name, entries.shape)
    kind = topology.index_dtype(rows, cols, max(entries.rows.numel(), 1))
    none = entries.rows.numel() == 0
    state[f"{name}.values"] = entries.values.new_zeros(1) if none else entries.values
    for part, tensor in (("rows", entries.rows), ("cols", entries.cols)):
        if not none and tensor.numel() and int(tensor.max()) > torch.iinfo(kind).max:
            kind = torch.int64  # `entries_of` says what is wrong with it
        state[f"{name}.{part}"] = torch.full((1,), -1, dtype=kind) if none else tensor.to(kind)
    state[f"{name}.shape"] = torch.tensor(entries.shape, dtype=torch.int64)


def array_of(tensor: Tensor) -> NDArray[Any]:
    """A tensor as an array; bfloat16, which NumPy does not have, becomes float32, exactly."""
    tensor = tensor.detach().cpu()
    return np.asarray(tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy())

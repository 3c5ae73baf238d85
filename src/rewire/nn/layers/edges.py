"""Edges from what users have: pairs, tensors, SciPy matrices and files, as keys of a weight.

An edge goes from a source, an input of the layer (a column of its weight), to a target, an output
(a row).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rewire.storage import columns

__all__ = ["Edges", "Ends", "Names", "ends_of", "frozen_of", "sizes_of"]

#: What stands for a list of edges: see `rewire.nn.from_edges`.
Edges: TypeAlias = Any
#: Names of units, in the order of their numbers.
Names: TypeAlias = Sequence[str]
#: The columns of a file with edges, and the one that may say which weight they are of.
_ENDS, _WEIGHT = ("source", "target"), ("weight",)

_FORMS = (
    "give (source, target) pairs (a list, or an array of shape (n, 2)), a tensor of shape (2, n) "
    "with sources and targets (edge_index), a tuple of two 1-D tensors or arrays, a SciPy sparse "
    "matrix (outputs, inputs), or the path of a .csv or .parquet file with columns source and "
    "target"
)


class Ends(NamedTuple):
    """The ends of edges; int64, (n,) each. ``shape`` (outputs, inputs) where the list says it."""

    sources: Tensor
    targets: Tensor
    shape: tuple[int, int] | None = None

    def keys(self, n_inputs: int, n_outputs: int, what: str) -> Tensor:
        """``target * n_inputs + source`` of every edge, in the order given.

        Raises ValueError for an edge that the layer does not have.
        """
        if self.shape is not None and self.shape != (n_outputs, n_inputs):
            swapped = self.shape == (n_inputs, n_outputs)
            raise ValueError(
                f"{what} is a matrix of shape {self.shape}, and the layer's weight is "
                f"{(n_outputs, n_inputs)}, (outputs, inputs)"
                + (": give its transpose, matrix.T" if swapped else "")
            )
        for name, unit, ends, most in (
            ("source", "inputs", self.sources, n_inputs),
            ("target", "outputs", self.targets, n_outputs),
        ):
            wrong = ((ends < 0) | (ends >= most)).nonzero()
            if wrong.numel():
                place = int(wrong[0])
                raise ValueError(
                    f"edge {place} of {what} has {name} {int(ends[place])}, and the layer has "
                    f"{most} {unit}, numbered from 0 to {most - 1}"
                )
        return self.targets * n_inputs + self.sources


def ends_of(
    edges: Edges, what: str = "edges", sources: Names | None = None, targets: Names | None = None
) -> Ends:
    """The ends of ``edges``, in their order.

    ``sources`` and ``targets`` are names of the units, where edges have names instead of numbers.
    Raises ValueError, with ``what`` as the name of the list, for anything that is no list of edges.
    """
    if isinstance(edges, Ends):
        return edges
    if isinstance(edges, str | os.PathLike):
        first, second = _read(Path(edges))
        what = f"{what} ({Path(edges).name})"
    elif hasattr(edges, "tocoo"):
        matrix = edges.tocoo()
        if len(matrix.shape) != 2:
            raise ValueError(f"{what} is a sparse array of shape {matrix.shape}: {_FORMS}")
        columns, rows = (np.asarray(part, dtype=np.int64) for part in (matrix.col, matrix.row))
        shape = int(matrix.shape[0]), int(matrix.shape[1])
        return Ends(torch.from_numpy(columns), torch.from_numpy(rows), shape)
    else:
        first, second = _columns(edges, what)
    return Ends(
        _numbers(first, sources, f"sources of {what}", "inputs="),
        _numbers(second, targets, f"targets of {what}", "outputs="),
    )


def frozen_of(
    frozen: Edges | bool | None, sources: Names | None = None, targets: Names | None = None
) -> Ends | Tensor | bool:
    """Which connections are frozen: True for all edges, False for no connection, a bool tensor with
    one entry for each edge, or edges of their own.
    """
    if frozen is None or isinstance(frozen, bool | Ends):
        return bool(frozen) if not isinstance(frozen, Ends) else frozen
    if isinstance(frozen, Tensor | np.ndarray) and frozen.ndim == 1:
        mask = torch.as_tensor(frozen).cpu()
        if mask.dtype == torch.bool:
            return mask
    return ends_of(frozen, "frozen", sources, targets)


def sizes_of(lists: Sequence[Ends]) -> tuple[int, int]:
    """The fewest inputs and outputs that a layer with all of these edges has; those of a matrix, if
    one is among them.
    """
    shapes = [ends.shape for ends in lists if ends.shape is not None]
    if shapes:
        return shapes[0][1], shapes[0][0]
    most = [
        max((int(part.max()) + 1 for part in parts if part.numel()), default=1)
        for parts in ([e.sources for e in lists], [e.targets for e in lists])
    ]
    return most[0], most[1]


def _columns(edges: Any, what: str) -> tuple[Any, Any]:
    """Sources and targets of edges in memory."""
    if isinstance(edges, Tensor):
        if edges.dim() != 2 or edges.shape[0] != 2:
            also = " (give its transpose, edges.t())" if tuple(edges.shape[1:]) == (2,) else ""
            raise ValueError(
                f"{what} is a tensor of shape {tuple(edges.shape)}, and an edge_index is "
                f"(2, n){also}: {_FORMS}"
            )
        return edges[0], edges[1]
    arrays = (Tensor, np.ndarray)
    if isinstance(edges, tuple) and len(edges) == 2 and all(isinstance(e, arrays) for e in edges):
        return edges[0], edges[1]
    if isinstance(edges, str | bytes | Mapping) or not isinstance(edges, Iterable):
        raise ValueError(f"{what} is {type(edges).__name__}: {_FORMS}")
    if not isinstance(edges, np.ndarray):
        pairs = [tuple(pair) if isinstance(pair, Iterable) else (pair,) for pair in edges]
        if any(len(pair) != 2 for pair in pairs):
            wrong = next(place for place, pair in enumerate(pairs) if len(pair) != 2)
            raise ValueError(f"entry {wrong} of {what} is no pair: {_FORMS}")
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if edges.ndim != 2 or edges.shape[1] != 2:
        raise ValueError(f"{what} is an array of shape {edges.shape}: {_FORMS}")
    return edges[:, 0], edges[:, 1]


def _numbers(ends: Any, names: Names | None, what: str, option: str) -> Tensor:
    """Numbers of units as an int64 tensor on the CPU."""
    if isinstance(ends, Tensor):
        ends = ends.detach().cpu().numpy()
    found = np.asarray(ends)
    if found.ndim != 1:
        raise ValueError(f"{what} must be 1-D, not of shape {found.shape}")
    if not found.size:
        return torch.empty(0, dtype=torch.int64)
    if names is not None:
        number = {str(name): place for place, name in enumerate(names)}
        if len(number) < len(names):
            raise ValueError(f"the names in {option} must be distinct")
        unknown = next((str(end) for end in found if str(end) not in number), None)
        if unknown is not None:
            raise ValueError(f"{what} have {unknown!r}, which is not among the names in {option}")
        return torch.tensor([number[str(end)] for end in found], dtype=torch.int64)
    if found.dtype.kind == "f" and bool((found == np.floor(found)).all()):
        found = found.astype(np.int64)  # as tables have them
    if found.dtype.kind not in "iu":
        raise ValueError(
            f"{what} must be whole numbers, not such as {found[0]!r}; where they are names, "
            f"list these in {option}, in the order of their numbers"
        )
    return torch.from_numpy(found.astype(np.int64))


def _read(path: Path) -> tuple[Any, Any]:
    """The columns source and target of a file."""
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    raise ValueError(f"{path.name} must end in .csv or .parquet")


def _read_csv(path: Path) -> tuple[Any, Any]:
    first: list[str] = []
    second: list[str] = []
    weights: set[str] = set()
    for source, target, *named in columns.CsvRows(path, _ENDS, _WEIGHT):
        first.append(source)
        second.append(target)
        weights.update(named)
    _one_weight(weights, path)
    return _parsed(first), _parsed(second)


def _read_parquet(path: Path) -> tuple[Any, Any]:
    try:
        found = columns.read_parquet(path, _ENDS, _WEIGHT).columns
    except ImportError:
        raise RuntimeError(
            "reading Parquet files needs pyarrow: pip install pyarrow (or give a CSV file)"
        ) from None
    if "weight" in found:
        _one_weight({str(name) for name in found["weight"].unique().to_pylist()}, path)
    source, target = (found[name].to_numpy() for name in _ENDS)
    return source, target


def _one_weight(names: set[str], path: Path) -> None:
    """ValueError for the edges of several weights, as `rewire.export` writes them."""
    named = sorted(name for name in names if not columns.is_number(name))
    if len(named) > 1:
        raise ValueError(
            f"{path.name} has edges of {len(named)} weights, such as {named[0]} and {named[1]}: "
            "keep the lines of one, or read all of it with rewire.load"
        )


def _parsed(words: list[str]) -> Any:
    """Whole numbers where all words are such, else the words."""
    try:
        return np.array(words, dtype=np.int64)
    except (ValueError, OverflowError):
        return np.array(words, dtype=object)

"""ONNX: a network with sparse or dense initialisers (the extra ``onnx``)."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rewire.export.lists.entries import Entries, array_of, entries_of
from rewire.export.states import dense_twin
from rewire.formats import FORMATS
from rewire.nn.convert.kinds import join, sparse_kind_of
from rewire.nn.convert.replacing import layers_of, swap
from rewire.nn.weight.listing import sparse_weights
from rewire.storage import files, reading

__all__ = ["OPSET", "OnnxExport", "OnnxWeight", "save_onnx", "write"]

#: The version of ONNX's operators that is written.
OPSET = 23

#: The most bytes of a file, which is one message of protobuf.
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class OnnxWeight:
    """A weight as it was written: "sparse" (values and int64 positions) or "dense"."""

    name: str
    stored: str
    connections: int
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class OnnxExport:
    """What `save_onnx` wrote.

    Attributes:
        bytes: of the file. dense_bytes: of the file if all weights were dense.
        opset: version of the operators.
        weights: those that are sparse in the model.
    """

    path: Path
    bytes: int
    dense_bytes: int
    opset: int
    weights: tuple[OnnxWeight, ...]

    def __str__(self) -> str:
        lines = [
            f"{w.name:<14} {w.connections:,} connections, {w.stored} in {w.bytes:,} bytes"
            for w in self.weights
        ]
        told = f"{self.bytes:,} bytes, all dense {self.dense_bytes:,}; opset {self.opset}"
        return "\n".join([*lines, f"{'onnx':<14} {self.path}, {told}"])


def save_onnx(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | Path,
    *,
    dense: bool = False,
    opset: int = OPSET,
    dynamic_batch: bool = True,
) -> OnnxExport:
    """Write ``model`` in eval mode as an ONNX file; needs the extra ``onnx``.

    Sparse weights become sparse initialisers (SparseTensorProto: a value and an int64 position for
    each connection), where these are smaller than a dense one, which is below a density of a third
    for float32. onnxruntime reads both, and multiplies by dense arrays in both cases: sparse ones
    save bytes of the file, not time. Programs that know no sparse initialisers need ``dense=True``.

    Args:
        example: an example of the input, at least one sample; a tuple for several inputs.
        dense: write all weights densely, of any size.
        opset: version of ONNX's operators.
        dynamic_batch: let the first dimension of the inputs be any number of samples.

    Memory is O(K) unless ``dense``; no array of a sparse weight's shape is made. Raises ValueError
    for a model that torch.onnx cannot export, and for a file above 2 GiB, ImportError if a package
    is missing. The file is complete or absent at every moment.
    """
    FORMATS["onnx"].require()
    args = example if isinstance(example, tuple) else (example,)
    parts: dict[str, list[tuple[int, Entries]]] = {}
    weights = dict(sparse_weights(model))
    if dense:
        twin = dense_twin(model, dense=True)
    else:
        twin, parts = _hollow(copy.deepcopy(model).eval())
    program = _program(twin, args, opset, dynamic_batch)
    initializers = program.model.graph.initializers
    for name in parts:
        initializers.pop(name, None)
    proto = program.model_proto
    written: list[OnnxWeight] = []
    for name, several in parts.items():
        written.append(_add(proto.graph, name, several))
    if dense:
        for name, weight in weights.items():
            size = weight.size * weight.values.element_size()
            written.append(OnnxWeight(name, "dense", weight.connections, size, size))
    size = proto.ByteSize()
    if size > _LARGEST:
        raise ValueError(
            f"the ONNX file would have {size:,} bytes, and a file has at most {_LARGEST:,}"
        )
    content = proto.SerializeToString()
    files.write_atomic(Path(path), content)
    total = len(content) + sum(w.dense_bytes - w.bytes for w in written)
    return OnnxExport(Path(path), len(content), total, opset, tuple(written))


def write(model: nn.Module, path: Path, *, example: Tensor, dense: bool = False) -> OnnxExport:
    """`save_onnx`, called as the writers of other formats are."""
    return save_onnx(model, example, path, dense=dense)


def _hollow(model: nn.Module) -> tuple[nn.Module, dict[str, list[tuple[int, Entries]]]]:
    """The dense twin of ``model``, whose weights take no memory: one zero, expanded to their shape.
    And for each of them, by name, what belongs there: connections, and the row where these begin.
    """
    found = {name: (layer, kind) for name, layer, kind in layers_of(model, sparse_kind_of)}
    entries = entries_of(model.state_dict())
    parts: dict[str, list[tuple[int, Entries]]] = {}

    def hollow(name: str) -> nn.Module:
        layer, kind = found[name]
        twin = kind.to_dense(copy.deepcopy(layer).to("meta"))
        places = kind.names(twin)
        own = dict(layer.named_parameters())
        rows: dict[str, int] = {}
        for path, parameter in list(twin.named_parameters()):
            parent, _, leaf = path.rpartition(".")
            if path in places.values():
                zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                value = nn.Parameter(zero, requires_grad=False)
            else:
                value = nn.Parameter(own[path].detach(), requires_grad=False)
            setattr(twin.get_submodule(parent), leaf, value)
        for path, stacked in places.items():
            weight = entries[join(name, path)]
            first = rows.get(stacked, 0)
            rows[stacked] = first + weight.shape[0]
            parts.setdefault(join(name, stacked), []).append((first, weight))
        return twin.train(layer.training)

    return swap(model, found, hollow), parts


def _program(model: nn.Module, args: tuple[Any, ...], opset: int, dynamic_batch: bool) -> Any:
    """The graph, every parameter under its own name."""
    shapes: Any = None
    if dynamic_batch:
        # An example of one sample would make 1 a constant of the program.
        args = tuple(a.expand(2, *a.shape[1:]) if a.shape[0] == 1 else a for a in args)
        shapes = tuple({0: "batch"} for _ in args)
    try:
        with _quiet(), torch.no_grad():
            # Not optimized: that would compute with the weights, which are not there yet. Runtimes
            # optimize what they load.
            return torch.onnx.export(
                model.requires_grad_(False),
                args,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        cause = error.__cause__ or error
        reason = reading.brief(str(cause).partition("\n\n")[0])
        raise ValueError(f"torch.onnx cannot export the model: {reason}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the messages of torch's exporter."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _add(graph: Any, name: str, parts: list[tuple[int, Entries]]) -> OnnxWeight:
    """Add an initialiser made of one weight, or of several stacked along their rows."""
    from onnx import SparseTensorProto, numpy_helper

    shape = (sum(e.shape[0] for _, e in parts), *parts[0][1].shape[1:])
    columns = parts[0][1].matrix_shape[1]
    places = torch.cat([(first + e.rows) * columns + e.cols for first, e in parts]).numpy()
    values = np.concatenate([array_of(e.values) for _, e in parts])
    whole = math.prod(shape) * values.itemsize
    count = len(values)
    if not count:  # runtimes refuse an empty list
        places, values = np.zeros(1, np.int64), np.zeros(1, values.dtype)
    size = len(values) * (values.itemsize + 8)
    if size >= whole:
        stored: NDArray[Any] = np.zeros(math.prod(shape), values.dtype)
        stored[places] = values
        graph.initializer.append(numpy_helper.from_array(stored.reshape(shape), name))
        return OnnxWeight(name, "dense", count, whole, whole)
    sparse = SparseTensorProto(dims=shape)
    sparse.values.CopyFrom(numpy_helper.from_array(values, name))
    sparse.indices.CopyFrom(numpy_helper.from_array(places.astype(np.int64), f"{name} positions"))
    graph.sparse_initializer.append(sparse)
    return OnnxWeight(name, "sparse", count, size, whole)

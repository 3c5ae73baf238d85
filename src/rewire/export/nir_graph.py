"""NIR, the intermediate representation of neuromorphic programs (the extra ``nir``)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rewire.export.chain import Stage, stages
from rewire.export.folding import affine
from rewire.export.lists.entries import Entries, array_of, entries_of, state_of
from rewire.export.states import check_dense
from rewire.formats import FORMATS
from rewire.nn.convert.kinds import join
from rewire.nn.forward.modes import evaluating
from rewire.nn.layers.adapted import refuse_adapted
from rewire.nn.layers.conv import SparseConv1d, SparseConv2d
from rewire.nn.layers.linear import SparseLinear
from rewire.nn.weight.pool import SparseWeight
from rewire.storage import files, reading

__all__ = ["Neurons", "nir_graph", "save_nir", "write"]

#: What takes the place of an activation: integrate-and-fire or leaky neurons, nothing, or what a
#: function makes of the shape of a layer's output.
Neurons = Literal["if", "lif", "none"] | Callable[[tuple[int, ...]], Any]

#: Time constant of leaky neurons, in seconds.
_TAU = 0.02

_LINEAR = nn.Linear | SparseLinear
_CONV = nn.Conv1d | nn.Conv2d | SparseConv1d | SparseConv2d
_SKIPPED = nn.Identity | nn.Dropout | nn.Dropout1d | nn.Dropout2d


def save_nir(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    neurons: Neurons = "if",
    dense: bool = False,
) -> int:
    """Write the graph of `nir_graph`; returns the bytes. ``nir.read`` reads it."""
    graph = nir_graph(model, example, neurons=neurons, dense=dense)
    import nir

    file = io.BytesIO()
    nir.write(file, graph)
    content = file.getbuffer()
    files.write_pieces(Path(path), [content])
    return len(content)


def write(
    model: nn.Module, path: Path, *, example: Tensor, neurons: Neurons = "if", dense: bool = False
) -> int:
    """`save_nir`, called as the writers of other formats are."""
    return save_nir(model, example, path, neurons=neurons, dense=dense)


def nir_graph(
    model: nn.Module, example: Tensor, *, neurons: Neurons = "if", dense: bool = False
) -> Any:
    """A `torch.nn.Sequential` as an ``NIRGraph``; needs the extra ``nir``.

    Linear layers become Affine or Linear nodes, 1-D and 2-D convolutions Conv nodes, average
    pooling and flattening AvgPool2d and Flatten nodes; BatchNorm is folded into the layer before
    it, dropout is left out. NIR has no ReLU: spiking neurons take its place, and their firing rate
    stands for its output.

    NIR's nodes have dense arrays. The metadata of a node also has the connections of a sparse
    weight, as a matrix by row: ``sparse_data``, ``sparse_indices``, ``sparse_indptr``.

    Args:
        example: an example of the input, at least one sample.
        neurons: "if" (integrate and fire, threshold 1, reset to 0), "lif" (the same, leaky, with a
            time constant of 20 ms), "none" (no node, for programs that add neurons themselves), or
            a function from the shape of a layer's output to a node of NIR.
        dense: allow weights of more than `rewire.export.DENSE_LIMIT` bytes in dense form.

    Raises ValueError, which names the layer, for what NIR cannot hold, and for a weight above the
    limit; ImportError if the package is missing. Memory O(M).
    """
    FORMATS["nir"].require()
    import nir

    if not callable(neurons) and neurons not in ("if", "lif", "none"):
        raise ValueError(f"neurons must be 'if', 'lif', 'none' or a function, not {neurons!r}")
    refuse_adapted(model)
    check_dense(model, dense)
    nodes: dict[str, Any] = {}
    with evaluating(model), torch.no_grad():
        for node in _nodes(model, example, neurons):
            nodes[f"{len(nodes)}_{type(node).__name__.lower()}"] = node
    every = list(nodes.values())
    nodes = {
        "input": nir.Input(input_type=every[0].input_type),
        **nodes,
        "output": nir.Output(output_type=every[-1].output_type),
    }
    names = list(nodes)
    return nir.NIRGraph(nodes=nodes, edges=list(pairwise(names)))


def _nodes(model: nn.Module, example: Tensor, neurons: Neurons) -> Iterator[Any]:
    """A node for each layer, in order."""
    import nir

    entries = entries_of(state_of(model))
    chain = list(stages(model))
    x = example
    for number, stage in enumerate(chain):
        before = tuple(x.shape[1:])
        layer = stage.layer
        try:
            x = layer(x)
        except Exception as error:
            raise ValueError(
                f"{_title(stage)} does not read the example: {reading.brief(error)}"
            ) from None
        if isinstance(layer, _LINEAR | _CONV):
            after = chain[number + 1].layer if number + 1 < len(chain) else None
            yield _weighted(
                stage, before, after if isinstance(after, _BatchNorm) else None, entries
            )
        elif isinstance(layer, _BatchNorm) and number:
            if not isinstance(chain[number - 1].layer, _LINEAR | _CONV):
                raise _refused(stage, "it follows no layer that it could be folded into")
        elif type(layer) is nn.ReLU:
            yield from _neurons(neurons, tuple(x.shape[1:]))
        elif type(layer) is nn.Flatten and layer.start_dim == 1 and layer.end_dim == -1:
            if len(before) > 1:
                yield nir.Flatten(input_type={"input": np.array(before)}, start_dim=0, end_dim=-1)
        elif type(layer) is nn.AvgPool2d and not layer.ceil_mode:
            yield _pool(stage, before, tuple(x.shape[1:]))
        elif not isinstance(layer, _SKIPPED) and not (number == 0 and type(layer) is nn.Unflatten):
            raise _refused(
                stage,
                "allowed are torch.nn.Sequentials of linear layers, 1-D and 2-D convolutions, "
                "BatchNorm after these, ReLU, AvgPool2d, Flatten and dropout",
            )


def _title(stage: Stage) -> str:
    return f"{stage.name or 'the model'} ({type(stage.layer).__name__})"


def _refused(stage: Stage, reason: str) -> ValueError:
    return ValueError(f"{_title(stage)} cannot be written to NIR: {reason}")


def _weighted(
    stage: Stage, shape: tuple[int, ...], norm: _BatchNorm | None, entries: dict[str, Entries]
) -> Any:
    """The node of a layer with a weight, after which ``norm`` comes."""
    import nir

    layer: Any = stage.layer
    convolves = isinstance(layer, _CONV)
    if convolves and layer.padding_mode != "zeros":
        raise _refused(stage, f"it pads by {layer.padding_mode!r}, and NIR pads by zeros")
    if convolves and layer.groups != 1:
        raise _refused(stage, "it has groups, with which the package nir reads no graph back")
    if not convolves and len(shape) != 1:
        raise _refused(stage, f"its input has the shape {shape} a sample: flatten it first")
    bias = None if layer.bias is None else layer.bias.double()
    factor = None
    if norm is not None:
        factor, shift = _affine(stage, norm)
        bias = shift if bias is None else bias * factor + shift
    metadata: dict[str, Any] = {}
    kind = layer.weight.dtype
    if isinstance(layer.weight, SparseWeight):
        found = entries[join(stage.name, "weight")]
        if factor is not None:
            found = found._replace(values=(found.values * factor[found.rows]).to(kind))
        rows, columns = found.matrix_shape
        whole = torch.zeros(rows * columns, dtype=kind)
        whole[found.rows * columns + found.cols] = found.values
        weight = array_of(whole.view(found.shape))
        metadata = {
            "sparse_data": array_of(found.values),
            "sparse_indices": found.cols.numpy(),
            "sparse_indptr": found.row_ptr().numpy(),
        }
    else:
        numbers = layer.weight.detach()
        if factor is not None:
            numbers = (numbers * factor.view(-1, *[1] * (numbers.dim() - 1))).to(kind)
        weight = array_of(numbers)
    offset = None if bias is None else array_of(bias.to(kind))
    if not convolves:
        if offset is None:
            return nir.Linear(weight=weight, metadata=metadata)
        return nir.Affine(weight=weight, bias=offset, metadata=metadata)
    rank = len(layer.kernel_size)
    padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
    settings = {name: tuple(getattr(layer, name)) for name in ("stride", "dilation")}
    if rank == 1:
        settings = {name: given[0] for name, given in settings.items()}
        padding = padding if isinstance(padding, str) else padding[0]
    if isinstance(padding, str):
        raise _refused(stage, f"its padding is {padding!r}: give it as a number")
    make = nir.Conv1d if rank == 1 else nir.Conv2d
    return make(
        input_shape=shape[1] if rank == 1 else tuple(shape[1:]),
        weight=weight,
        padding=padding,
        groups=layer.groups,
        bias=np.zeros(weight.shape[0], weight.dtype) if offset is None else offset,
        metadata=metadata,
        **settings,
    )


def _affine(stage: Stage, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    found = affine(norm)
    if found is None:
        raise _refused(stage, "the BatchNorm after it has no running statistics")
    return found


def _neurons(neurons: Neurons, shape: tuple[int, ...]) -> Iterator[Any]:
    import nir

    one: NDArray[np.float32] = np.ones(shape, np.float32)
    if callable(neurons):
        yield neurons(shape)
    elif neurons == "if":
        yield nir.IF(r=one, v_threshold=one, v_reset=0 * one)
    elif neurons == "lif":
        rest = 0 * one
        yield nir.LIF(tau=_TAU * one, r=one, v_leak=rest, v_threshold=one, v_reset=rest)


def _pool(stage: Stage, before: tuple[int, ...], after: tuple[int, ...]) -> Any:
    import nir

    layer: Any = stage.layer
    if layer.divisor_override is not None or (layer.padding and not layer.count_include_pad):
        raise _refused(stage, "it divides by another number than that of its window")

    def pair(value: Any) -> NDArray[np.int64]:
        return np.array([value, value] if isinstance(value, int) else list(value))

    node = nir.AvgPool2d(
        kernel_size=pair(layer.kernel_size), stride=pair(layer.stride), padding=pair(layer.padding)
    )
    node.input_type, node.output_type = {"input": np.array(before)}, {"output": np.array(after)}
    return node

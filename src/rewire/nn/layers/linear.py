"""`SparseLinear`: the twin of `torch.nn.Linear` with a connection budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rewire import ops
from rewire.budget import Limits
from rewire.nn.layers.base import SparseLayer, autocast_dtype
from rewire.nn.layers.edges import Edges, Ends, Names, ends_of, frozen_of, sizes_of
from rewire.nn.layers.initial import Init
from rewire.nn.layers.known import known
from rewire.nn.weight.pool import SparseWeight

__all__ = ["SparseLinear", "from_edges", "input_dtype", "product"]


def input_dtype(weight: SparseWeight, narrow: torch.dtype) -> torch.dtype:
    """The dtype of the input of a product with ``weight`` under autocast with the dtype
    ``narrow``.
    """
    return narrow if weight.dtype == torch.float32 and narrow in ops.NARROW else weight.dtype


def product(
    x: Tensor, weight: SparseWeight, bias: Tensor | None, contiguous_output: bool = False
) -> Tensor:
    """``x W^T + bias``, (..., cols) -> (..., rows), as a layer computes it, with capture and
    autocast.

    Autocast narrows x and the result; values and sums keep the weight's dtype. See
    `rewire.ops.sparse_linear`.
    """
    narrow = autocast_dtype(x, weight)
    if narrow is not None:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(input_dtype(weight, narrow))
            return product(x, weight, bias, contiguous_output).to(narrow)
    values, index = weight.operand()
    return ops.sparse_linear(x, values, bias, index, weight.capture, contiguous_output)


class SparseLinear(SparseLayer):
    """``y = x W^T + b`` with a weight of exactly ``connections`` connections.

    Arguments are those of `torch.nn.Linear`, plus:
        connections, density: the budget, exactly one of them; K of the M = in_features *
            out_features.
        capacity: slots of the pool (K by default), see `SparseWeight`.
        limits: most connections of an output, of an input and of a block of the matrix, see
            `rewire.budget.Limits`.
        edges: connections that the layer has at first, see `from_edges` for the forms. Without
            ``connections`` and ``density`` these are all it has; else the others are drawn at
            random.
        allowed: the positions that connections may ever have, in the same forms; what is drawn or
            grows is among them. Edges are allowed as well. None: all positions.
        frozen: connections that no method drops: True for all edges, a bool tensor or array with
            one entry for each edge, or edges of their own.
        generator: draws topology, values and bias; torch's default generator otherwise.
        init: how large the first values are: "auto", "dense" or "sparse", see `reset_parameters`.
        contiguous_output: return row-major memory. By default the result (..., out_features) is
            feature-major in memory. Sparse layers, ReLU, dropout and residual sums keep this
            layout, so chains of layers never transpose; instead of `.view` it may need `.reshape`.
            From 512 rows of a row-major input on, results are row-major anyway.

    Shapes: input (..., in_features) with any strides, output (..., out_features). The first values
    are U(-b, b) with b = 1 / sqrt(connections of the output), so an output has the variance that it
    has in `torch.nn.Linear`; see `reset_parameters`.

    Under autocast, activations and their gradients have autocast's dtype; values and sums keep the
    weight's dtype.

    Cost: O(K batch) time in each of the three products, O(K + in + out) memory besides activations.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        connections: int | None = None,
        density: float | None = None,
        capacity: int | None = None,
        limits: Limits | None = None,
        edges: Edges | None = None,
        allowed: Edges | None = None,
        frozen: Edges | bool = False,
        generator: torch.Generator | None = None,
        contiguous_output: bool = False,
        init: Init = "auto",
    ) -> None:
        super().__init__()
        given = known(in_features, out_features, connections, density, edges, allowed, frozen)
        weight = SparseWeight(
            (out_features, in_features),
            given.connections,
            density=given.density,
            capacity=capacity,
            limits=limits,
            prior=given.prior,
            start=given.start,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self._assemble(weight, bias, contiguous_output)
        self.reset_parameters(generator, init=init)

    @classmethod
    def from_weight(
        cls, weight: SparseWeight, bias: Tensor | None = None, *, contiguous_output: bool = False
    ) -> SparseLinear:
        """A layer around an existing 2-D pool; ``bias`` (out_features,) is copied."""
        if len(weight.shape) != 2:
            raise ValueError(f"a linear layer needs a 2-D weight, not {tuple(weight.shape)}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._assemble(weight, bias, contiguous_output)
        return self

    def _assemble(
        self, weight: SparseWeight, bias: bool | Tensor | None, contiguous_output: bool
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.contiguous_output = contiguous_output
        self._hold(weight, bias)

    def _product(self, x: Tensor) -> Tensor:
        # This is part of every forward pass, so it avoids the attribute look-ups of
        # torch.nn.Module.
        weight: Any = self._modules["weight"]
        values, index = weight.operand()
        parameters = self._parameters
        # A parametrized bias is not among the parameters.
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        return ops.sparse_linear(x, values, bias, index, weight.capture, self.contiguous_output)

    def _input_dtype(self, narrow: torch.dtype) -> torch.dtype:
        return input_dtype(self.weight, narrow)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._budget_repr()}"
        )


def from_edges(
    edges: Edges,
    in_features: int | None = None,
    out_features: int | None = None,
    bias: bool = True,
    *,
    allowed: Edges | None = None,
    frozen: Edges | bool = False,
    inputs: Names | None = None,
    outputs: Names | None = None,
    **options: Any,
) -> SparseLinear:
    """A `SparseLinear` with the given edges, such as known pathways or the wires of a chip::

        layer = rewire.nn.from_edges([(0, 1), (3, 1), (2, 0)], in_features=4, out_features=2)

    An edge goes from a source (an input of the layer) to a target (an output). Lists of edges are

    - (source, target) pairs: a list, or an array of shape (n, 2);
    - a tensor of shape (2, n), sources and then targets, as torch_geometric's ``edge_index``;
    - a tuple of two 1-D tensors or arrays, sources and targets;
    - a SciPy sparse matrix or array of shape (out_features, in_features), as the weight: where an
      entry is stored there is an edge, whatever its value;
    - the path of a CSV or Parquet file that has columns ``source`` and ``target``; Parquet needs
      pyarrow.

    Args:
        in_features, out_features: without them, the number of names, or the shape of a SciPy
            matrix, or as many as the largest numbers in the lists ask for.
        allowed, frozen: positions for growth, and connections that are never dropped, see
            `SparseLinear`.
        inputs, outputs: the names of inputs and outputs, in their order, where lists have names and
            not numbers.
        options: other arguments of `SparseLinear`: with ``connections`` or ``density`` it has
            random connections besides the edges.

    Raises ValueError for a list of another form, a number or a name that the layer does not have,
    or an edge that occurs twice. O(edges log edges) time and O(edges) memory.
    """
    first = ends_of(edges, "edges", inputs, outputs)
    around = None if allowed is None else ends_of(allowed, "allowed", inputs, outputs)
    held = frozen_of(frozen, inputs, outputs)
    fewest = sizes_of([part for part in (first, around, held) if isinstance(part, Ends)])
    given = (in_features, inputs, fewest[0]), (out_features, outputs, fewest[1])
    n_inputs, n_outputs = (
        size if size is not None else least if own is None else len(own)
        for size, own, least in given
    )
    return SparseLinear(
        n_inputs, n_outputs, bias, edges=first, allowed=around, frozen=held, **options
    )

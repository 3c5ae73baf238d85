"""`SparseLinear`: the twin of `torch.nn.Linear` with a connection budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rewire import ops
from rewire.budget import Limits
from rewire.nn.layers.base import SparseLayer, autocast_dtype
from rewire.nn.layers.initial import Init
from rewire.nn.weight.pool import SparseWeight

__all__ = ["SparseLinear", "input_dtype", "product"]


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
        generator: draws topology, values and bias; torch's default generator otherwise.
        init: how large the first values are: "auto", "dense" or "sparse", see `reset_parameters`.
        contiguous_output: return row-major memory. By default the result (..., out_features) is
            feature-major in memory. Sparse layers, ReLU, dropout and residual sums keep this
            layout, so chains of layers never transpose; instead of `.view` it may need `.reshape`.

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
        generator: torch.Generator | None = None,
        contiguous_output: bool = False,
        init: Init = "auto",
    ) -> None:
        super().__init__()
        weight = SparseWeight(
            (out_features, in_features),
            connections,
            density=density,
            capacity=capacity,
            limits=limits,
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

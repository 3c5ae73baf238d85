"""`SparseLinear`: the twin of `torch.nn.Linear` with a connection budget."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewire import ops
from rewire.nn.weight import SparseWeight

__all__ = ["SparseLinear", "autocast_dtype", "product"]


def autocast_dtype(x: Tensor, weight: SparseWeight) -> torch.dtype | None:
    """What autocast narrows a product to; None where it is off and, as in torch.nn, for float64."""
    kind = x.device.type
    if kind == "meta" or weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def product(x: Tensor, weight: SparseWeight, bias: Tensor | None, contiguous_output: bool = False) -> Tensor:
    """``x W^T + bias``, (..., cols) -> (..., rows), as a layer computes it: also captured, also under autocast.

    Autocast narrows the result; values and sums stay in the weight's own dtype. See `rewire.ops.sparse_linear`.
    """
    narrow = autocast_dtype(x, weight)
    if narrow is not None:
        with torch.autocast(x.device.type, enabled=False):
            return product(x.to(weight.dtype), weight, bias, contiguous_output).to(narrow)
    return ops.sparse_linear(x, weight.values, bias, weight.index, weight.capture, contiguous_output)


class SparseLinear(nn.Module):
    """``y = x W^T + b`` with a weight of exactly ``connections`` connections.

    Arguments are those of `torch.nn.Linear`, plus:
        connections, density: the budget, exactly one of them; K of the M = in_features * out_features.
        capacity: slots of the pool (K by default), see `SparseWeight`.
        generator: draws topology, values and bias; torch's default generator otherwise.
        contiguous_output: return row-major memory. By default the result is a (..., out_features) tensor laid out
            feature-major, which a following sparse layer, ReLU, dropout or residual sum keeps, so chains of layers
            never transpose; `.view` on it may need `.reshape`.

    Shapes: input (..., in_features) with any strides, output (..., out_features). Values start as those of
    `torch.nn.Linear`, U(-b, b) with b = 1 / sqrt(in_features); see `reset_parameters` for larger ones.

    Under autocast the result has autocast's dtype, while values and sums stay in the weight's own.

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
        generator: torch.Generator | None = None,
        contiguous_output: bool = False,
    ) -> None:
        super().__init__()
        weight = SparseWeight(
            (out_features, in_features),
            connections,
            density=density,
            capacity=capacity,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self._assemble(weight, bias, contiguous_output)
        self.reset_parameters(generator)

    @classmethod
    def from_weight(
        cls, weight: SparseWeight, bias: Tensor | None = None, *, contiguous_output: bool = False
    ) -> SparseLinear:
        """A layer around an existing 2-D pool; ``bias`` (out_features,) is copied."""
        if len(weight.shape) != 2:
            raise ValueError(f"a linear layer needs a 2-D weight, not {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), not {tuple(bias.shape)}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._assemble(weight, bias is not None, contiguous_output)
        if bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)
        return self

    def _assemble(self, weight: SparseWeight, bias: bool, contiguous_output: bool) -> None:
        self.out_features, self.in_features = weight.shape
        self.contiguous_output = contiguous_output
        self.weight = weight
        self.bias: nn.Parameter
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.out_features, device=weight.device, dtype=weight.dtype))
        else:
            self.register_parameter("bias", None)

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator | None = None, *, fan_in: Literal["dense", "sparse"] = "dense"
    ) -> None:
        """Draw new values U(-b, b), b = 1 / sqrt(fan-in), and bias for the connections there are.

        fan_in: "dense" counts all inputs, as `torch.nn.Linear` does. Connections then start small beside a rewiring
            step, so that useless ones (on pixels that are always 0, say) give their place away early; DEEP R's authors
            start so. "sparse" counts the connections a row has on average, which keeps the scale of activations; better
            where the topology is fixed. Measured on MNIST in docs/results/mnist_authors.json.
        """
        if fan_in not in ("dense", "sparse"):
            raise ValueError(f"fan_in must be 'dense' or 'sparse', not {fan_in!r}")
        weight = self.weight
        if weight.device.type == "meta":
            return
        dense = 1 / math.sqrt(self.in_features)
        bound = dense if fan_in == "dense" else 1 / math.sqrt(max(weight.connections / self.out_features, 1))
        weight.values.uniform_(-bound, bound, generator=generator)
        weight.values.masked_fill_(weight.rows < 0, 0.0)
        if self.bias is not None:
            self.bias.uniform_(-dense, dense, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return product(x, self.weight, self.bias, self.contiguous_output)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        if prefix + "weight" in state_dict:
            error_msgs: list[str] = arguments[-1]
            error_msgs.append(
                f"{prefix}weight is dense, and a sparse weight is saved as values, rows and cols: load it into a dense "
                "model, and use rewire.sparsify(model, select='magnitude') on that"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"connections={self.weight.connections}, density={self.weight.density:.4g}"
        )

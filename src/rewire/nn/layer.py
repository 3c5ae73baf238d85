"""What the layers with one weight share: weight and bias, their initial values, autocast."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewire.nn.twin import Twin
from rewire.nn.weight import SparseWeight

__all__ = ["SparseLayer", "autocast_dtype"]


def autocast_dtype(x: Tensor, weight: SparseWeight) -> torch.dtype | None:
    """What autocast narrows a product to; None where it is off and, as in torch.nn, for float64."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or weight.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


class SparseLayer(Twin):
    """A layer of one `SparseWeight` and perhaps a bias of one number per row of it; subclasses say how to apply them.

    Under autocast the result has autocast's dtype, while values and sums stay in the weight's own.
    """

    weight: SparseWeight
    bias: nn.Parameter

    def _hold(self, weight: SparseWeight, bias: bool | Tensor | None) -> None:
        """Take ``weight`` and make a bias: none, zeros (True), or a copy of a tensor."""
        rows = weight.shape[:1]
        if isinstance(bias, Tensor) and bias.shape != rows:
            raise ValueError(f"bias must have shape {tuple(rows)}, not {tuple(bias.shape)}")
        self.weight = weight
        if bias is None or bias is False:
            self.register_parameter("bias", None)
            return
        self.bias = nn.Parameter(torch.zeros(rows, device=weight.device, dtype=weight.dtype))
        if isinstance(bias, Tensor):
            with torch.no_grad():
                self.bias.copy_(bias)

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator | None = None, *, fan_in: Literal["dense", "sparse"] = "dense"
    ) -> None:
        """Draw new values U(-b, b), b = 1 / sqrt(fan-in), and bias for the connections there are.

        fan_in: "dense" counts all inputs, as the layers of `torch.nn` do. Connections then start small beside a
            rewiring step, so that useless ones (on pixels that are always 0, say) give their place away early; DEEP
            R's authors start so. "sparse" counts the connections a row has on average, which keeps the scale of
            activations; better where the topology is fixed. Measured on MNIST in docs/results/mnist_authors.json.
        """
        if fan_in not in ("dense", "sparse"):
            raise ValueError(f"fan_in must be 'dense' or 'sparse', not {fan_in!r}")
        weight = self.weight
        if weight.device.type == "meta":
            return
        if not weight.drawn:
            weight.draw(generator)
        rows, cols = weight.matrix_shape
        dense = 1 / math.sqrt(cols)
        bound = dense if fan_in == "dense" else 1 / math.sqrt(max(weight.connections / rows, 1))
        weight.values.uniform_(-bound, bound, generator=generator)
        weight.values.masked_fill_(weight.rows < 0, 0.0)
        if self.bias is not None:
            self.bias.uniform_(-dense, dense, generator=generator)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer; shapes as in the layer's description."""
        narrow = autocast_dtype(input, self._modules["weight"])  # type: ignore[arg-type]  # no look-up of attributes
        if narrow is None:
            return self._product(input)
        with torch.autocast(input.device.type, enabled=False):
            return self._product(input.to(self._input_dtype(narrow))).to(narrow)

    def _input_dtype(self, narrow: torch.dtype) -> torch.dtype:
        """What x is converted to under autocast, whose dtype is ``narrow``."""
        return self.weight.dtype

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor:
        """The layer's result for ``x`` of the weight's dtype."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        if prefix + "weight" in state_dict:
            error_msgs: list[str] = arguments[-1]
            error_msgs.append(
                f"{prefix}weight is dense, and a sparse weight is saved as values, rows and cols: load it into a dense "
                "model, and use rewire.sparsify(model, select='magnitude') on that"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _budget_repr(self) -> str:
        return f"connections={self.weight.connections}, density={self.weight.density:.4g}"

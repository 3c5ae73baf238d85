"""What layers with one weight share: weight and bias, their initial values, autocast."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rewire.nn.layers.initial import Init, check_init, draw_values
from rewire.nn.weight.pool import SparseWeight
from rewire.nn.weight.twin import Twin
from rewire.ops import Pair

__all__ = ["SparseLayer", "autocast_dtype"]


def autocast_dtype(x: Tensor, weight: SparseWeight) -> torch.dtype | None:
    """The dtype that autocast gives products; None if it is off and, as in torch.nn, for
    float64.
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or weight.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


class SparseLayer(Twin):
    """A layer with one `SparseWeight` and perhaps a bias, one number for each row of the weight.

    Subclasses apply them. Under autocast the result has autocast's dtype, while values and sums
    keep the weight's dtype.
    """

    weight: SparseWeight
    bias: nn.Parameter

    def _hold(self, weight: SparseWeight, bias: bool | Tensor | None) -> None:
        """Take ``weight``, and a bias: zeros (True), a copy of a tensor, or no bias."""
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
        self, generator: torch.Generator | None = None, *, init: Init = "auto"
    ) -> None:
        """Draw values for the present connections, and a bias as in the dense twin.

        The dense twin in `torch.nn` draws both from U(-b, b), b = 1 / sqrt(inputs of a row).
        ``init`` is what b depends on for a row with fewer inputs: its own number of connections
        ("auto"), the mean number ("sparse"), or b stays ("dense"); see
        `rewire.nn.layers.initial.draw_values`.
        """
        self.reset_weights(generator, init=init)
        if self.bias is not None and self.weight.device.type != "meta":
            bound = 1 / math.sqrt(self.weight.matrix_shape[1])
            self.bias.uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def reset_weights(
        self, generator: torch.Generator | None = None, *, init: Init = "auto"
    ) -> None:
        """As `reset_parameters`, but the bias stays."""
        check_init(init)
        weight = self.weight
        if weight.device.type == "meta":
            return
        if not weight.drawn:
            weight.draw(generator)
        draw_values(weight, 1 / math.sqrt(weight.matrix_shape[1]), init, generator)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer; shapes as in the layer's description."""
        narrow = autocast_dtype(input, self._modules["weight"])  # type: ignore[arg-type]  # no look-up of attributes
        if narrow is None:
            return self._product(input)
        with torch.autocast(input.device.type, enabled=False):
            return self._product(input.to(self._input_dtype(narrow))).to(narrow)

    #: The dimension of the output that counts the rows of the weight.
    rows_axis: ClassVar[int] = -1

    def pair(self, x: Tensor, y: Tensor) -> Pair:
        """Input and output of a call as a `rewire.ops.Pair` has them: with one batch dimension, and
        padded where the layer pads with other numbers than zeros. Views where possible.
        """
        return Pair(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))

    def _input_dtype(self, narrow: torch.dtype) -> torch.dtype:
        """The dtype that x is converted to under autocast with the dtype ``narrow``."""
        return self.weight.dtype

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor:
        """The layer's result for ``x`` of the weight's dtype."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        if prefix + "weight" in state_dict:
            error_msgs: list[str] = arguments[-1]
            error_msgs.append(
                f"{prefix}weight is dense, and a sparse weight is saved as values, rows and cols: "
                "load it into a dense model, and use rewire.sparsify(model, select='magnitude') on "
                "that"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _budget_repr(self) -> str:
        return f"connections={self.weight.connections}, density={self.weight.density:.4g}"

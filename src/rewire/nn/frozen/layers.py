"""Frozen layers: the sparse layers with a `FrozenWeight` for each `SparseWeight`, for inference.

They are called as the layers that `rewire.freeze` makes them of.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rewire.nn.frozen.weight import FrozenWeight, check_no_gradient
from rewire.nn.layers.attention import SparseMultiheadAttention
from rewire.nn.layers.base import autocast_dtype
from rewire.nn.layers.conv import SparseConv1d, SparseConv2d, SparseConv3d
from rewire.nn.layers.frozen import Frozen
from rewire.nn.layers.linear import SparseLinear, input_dtype
from rewire.nn.layers.recurrent import SparseGRU, SparseLSTM, SparseRNN
from rewire.nn.layers.recurrent_base import Recurrent
from rewire.ops import frozen_conv
from rewire.ops.cells import State
from rewire.ops.recurrence import inference

__all__ = [
    "FROZEN",
    "FrozenConv1d",
    "FrozenConv2d",
    "FrozenConv3d",
    "FrozenGRU",
    "FrozenLSTM",
    "FrozenLinear",
    "FrozenMultiheadAttention",
    "FrozenRNN",
]


def _product(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """`FrozenWeight.product` with autocast, as `rewire.nn.layers.linear.product`."""
    narrow = autocast_dtype(x, weight)
    if narrow is None:
        y: Tensor = weight.product(x, bias)
        return y
    with torch.autocast(x.device.type, enabled=False):
        y = weight.product(x.to(input_dtype(weight, narrow)), bias)
        return y.to(narrow)


class FrozenLinear(Frozen, SparseLinear):
    """`rewire.nn.SparseLinear` for inference. Its output is row-major."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        # Many calls are for one row, where each look-up counts.
        if not torch.is_autocast_enabled("cpu"):
            weight: Any = self._modules["weight"]
            y: Tensor | None = weight.quick(input, self._parameters["bias"])
            if y is not None:
                return y
        return super().forward(input)

    def _product(self, x: Tensor) -> Tensor:
        weight: Any = self._modules["weight"]  # no look-up of attributes
        y: Tensor = weight.product(x, self._parameters["bias"])
        return y


class _FrozenConv(Frozen):
    weight: Any
    bias: Any
    _geometry: Any

    def _convolved(self, x: Tensor) -> Tensor:
        check_no_gradient(x)
        weight: FrozenWeight = self.weight
        if x.dtype != weight.dtype:
            raise RuntimeError(
                f"x is {x.dtype} but the frozen weight is {weight.dtype}: convert one, so that "
                "both agree"
            )
        return frozen_conv(weight.lists(), x, self.bias, self._geometry)


class FrozenConv1d(_FrozenConv, SparseConv1d):
    """`rewire.nn.SparseConv1d` for inference."""


class FrozenConv2d(_FrozenConv, SparseConv2d):
    """`rewire.nn.SparseConv2d` for inference."""


class FrozenConv3d(_FrozenConv, SparseConv3d):
    """`rewire.nn.SparseConv3d` for inference."""


class _FrozenRecurrent(Frozen, Recurrent):
    def _direction(
        self, x: Tensor, sizes: list[int], initial: State, suffix: str
    ) -> tuple[Tensor, State]:
        b_ih, b_hh = self._biases(suffix)
        named = [("ih", b_ih), ("hh", b_hh), *([("hr", None)] if self.proj_size else [])]
        products = [
            partial(_product, weight=self._modules[f"weight_{kind}_{suffix}"], bias=bias)
            for kind, bias in named
        ]
        reverse = suffix.endswith("_reverse")
        return inference(self._cell(), x, sizes, reverse, initial, products)


class FrozenRNN(_FrozenRecurrent, SparseRNN):
    """`rewire.nn.SparseRNN` for inference."""


class FrozenGRU(_FrozenRecurrent, SparseGRU):
    """`rewire.nn.SparseGRU` for inference."""


class FrozenLSTM(_FrozenRecurrent, SparseLSTM):
    """`rewire.nn.SparseLSTM` for inference."""


class FrozenMultiheadAttention(Frozen, SparseMultiheadAttention):
    """`rewire.nn.SparseMultiheadAttention` for inference."""

    def _project(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)


#: The frozen class of each sparse one.
FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    SparseLinear: FrozenLinear,
    SparseConv1d: FrozenConv1d,
    SparseConv2d: FrozenConv2d,
    SparseConv3d: FrozenConv3d,
    SparseRNN: FrozenRNN,
    SparseGRU: FrozenGRU,
    SparseLSTM: FrozenLSTM,
    SparseMultiheadAttention: FrozenMultiheadAttention,
}

"""Dense layers with a sparse difference beside their weight: what `rewire.adapt` makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rewire.nn.layers.base import SparseLayer
from rewire.nn.layers.conv import SparseConv1d, SparseConv2d, SparseConv3d
from rewire.nn.layers.linear import SparseLinear
from rewire.nn.weight.pool import SparseWeight

__all__ = [
    "ADAPTED",
    "DIFFERENCE",
    "REASON",
    "Adapted",
    "AdaptedConv1d",
    "AdaptedConv2d",
    "AdaptedConv3d",
    "AdaptedLinear",
    "dense_class",
    "difference_of",
    "put_beside",
    "refuse_adapted",
    "take_off",
]

#: The name of the sparse layer within an adapted one.
DIFFERENCE = "difference"

#: Why what takes dense or sparse layers does not take an adapted one.
REASON = (
    "has a difference beside its weight (rewire.adapt): call merge() or detach() of the adapter "
    "first"
)


class Adapted(nn.Module):
    """A dense layer whose weight stays as it is, and a sparse `difference` of the same shape, which
    is trained: ``y = layer(x) + difference(x)``.

    An object becomes one by a change of its class (`put_beside`), so its parameters, hooks and
    names stay what they are, and stops being one in the same way (`take_off`).
    """

    difference: SparseLayer

    def forward(self, input: Tensor) -> Tensor:
        """Shapes as those of the dense layer."""
        y: Tensor = super().forward(input)
        return y.add_(self._added(input, y.dtype))  # nothing else has seen y

    def _added(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        """What the difference adds to a result of this dtype."""
        return self.difference(input)  # type: ignore[no-any-return]


class AdaptedLinear(Adapted, nn.Linear):
    """`torch.nn.Linear` with a sparse difference."""


class _AdaptedConv(Adapted):
    def _added(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        # Sparse convolutions, unlike linear layers, take no input of 16 bits beside wide values.
        return self.difference(input.to(self.difference.weight.dtype)).to(dtype)  # type: ignore[no-any-return]


class AdaptedConv1d(_AdaptedConv, nn.Conv1d):
    """`torch.nn.Conv1d` with a sparse difference."""


class AdaptedConv2d(_AdaptedConv, nn.Conv2d):
    """`torch.nn.Conv2d` with a sparse difference."""


class AdaptedConv3d(_AdaptedConv, nn.Conv3d):
    """`torch.nn.Conv3d` with a sparse difference."""


#: The adapted class of each dense one.
ADAPTED: dict[type[nn.Module], type[Adapted]] = {
    nn.Linear: AdaptedLinear,
    nn.Conv1d: AdaptedConv1d,
    nn.Conv2d: AdaptedConv2d,
    nn.Conv3d: AdaptedConv3d,
}

_DENSE: dict[type[nn.Module], type[nn.Module]] = {a: dense for dense, a in ADAPTED.items()}

_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.Conv3d: SparseConv3d,
}


def dense_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class that an adapted ``layer`` had; None for any other, and for subclasses of adapted
    ones.
    """
    return _DENSE.get(type(layer))


def difference_of(layer: nn.Module, weight: SparseWeight) -> SparseLayer:
    """A sparse layer without bias around ``weight``, for the dense or adapted ``layer``."""
    made: SparseLayer
    convolution = _CONVOLUTIONS.get(dense_class(layer) or type(layer))
    if convolution is not None:
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        made = convolution.from_weight(weight, **{name: getattr(layer, name) for name in names})
    else:
        # Dense layers give row-major results, and one transposition here is cheaper than a sum of
        # two layouts.
        made = SparseLinear.from_weight(weight, contiguous_output=True)
    return made


def put_beside(layer: nn.Module, difference: SparseLayer) -> None:
    """Make the dense ``layer`` an adapted one."""
    layer.__class__ = ADAPTED[type(layer)]
    layer.add_module(DIFFERENCE, difference.train(layer.training))


def take_off(layer: nn.Module) -> SparseLayer:
    """Make an adapted ``layer`` the dense one that it was; returns the difference."""
    difference = layer._modules.pop(DIFFERENCE)
    layer.__class__ = _DENSE[type(layer)]
    assert isinstance(difference, SparseLayer)
    return difference


def refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError if a layer of ``model`` is an adapted one."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            raise ValueError(f"{name or 'the model'} {REASON}")

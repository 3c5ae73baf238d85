"""BatchNorm in eval mode: a factor and a shift for each channel."""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["affine"]


def affine(norm: _BatchNorm) -> tuple[Tensor, Tensor] | None:
    """The factor and the shift of each channel in eval mode, float64; None without running
    statistics, where they depend on the batch.
    """
    if norm.running_mean is None or norm.running_var is None:
        return None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return factor, shift

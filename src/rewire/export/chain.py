"""The layers of a network that computes one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from rewire.nn.convert.kinds import join
from rewire.nn.layers.linear import SparseLinear

__all__ = ["ELEMENTWISE", "Stage", "linear_weights", "linked", "stages"]

#: Layers that change each number by itself, so that unit i of the input is unit i of the output.
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus,
    nn.Identity, nn.Dropout, nn.BatchNorm1d, nn.Hardtanh, nn.Mish, nn.SELU, nn.CELU, nn.PReLU,
)  # fmt: skip


class Stage(NamedTuple):
    """A layer and its name in the model."""

    name: str
    layer: nn.Module


def stages(model: nn.Module, prefix: str = "") -> Iterator[Stage]:
    """The layers of a `torch.nn.Sequential` in order, those of Sequentials within too; any other
    model is one stage.
    """
    if type(model) is not nn.Sequential:
        yield Stage(prefix, model)
        return
    for name, child in model.named_children():
        yield from stages(child, join(prefix, name))


def linked(model: nn.Module) -> dict[str, str]:
    """For each linear weight, by name, the name of the weight whose outputs are its inputs: that of
    the linear layer before it in a `torch.nn.Sequential`, if only elementwise layers stand between.
    """
    found: dict[str, str] = {}
    before: str | None = None
    for name, layer in stages(model):
        if isinstance(layer, SparseLinear | nn.Linear):
            weight = join(name, "weight")
            if before is not None:
                found[weight] = before
            before = weight
        elif not isinstance(layer, ELEMENTWISE):
            before = None
    return found


def linear_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The dense linear weights among the stages, by name."""
    for name, layer in stages(model):
        if type(layer) is nn.Linear:
            yield join(name, "weight"), layer.weight.detach()

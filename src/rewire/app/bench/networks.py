"""Networks to measure: perceptrons, a layer with a mask, and ResNet-18."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewire.app.models import images

__all__ = ["MaskedLinear", "mlp", "resnet18", "set_mlp"]


class MaskedLinear(nn.Linear):
    """A dense layer without bias that multiplies its weight by a random mask in each pass."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, density: float) -> None:
        super().__init__(inputs, outputs, bias=False)
        keep = max(1, round(density * inputs * outputs))
        mask = torch.zeros(outputs * inputs)
        mask[torch.randperm(outputs * inputs)[:keep]] = 1
        self.register_buffer("mask", mask.view(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs) -> (batch, outputs)."""
        return F.linear(x, self.weight * self.mask)


def mlp(sizes: Sequence[int], layer: Callable[[int, int, int], nn.Module]) -> nn.Sequential:
    """Layers with ReLU between them; ``layer`` makes the i-th from (inputs, outputs, i)."""
    modules: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        modules += [nn.ReLU()] if modules else []
        modules.append(layer(inputs, outputs, number))
    return nn.Sequential(*modules)


def set_mlp() -> nn.Module:
    """The perceptron of the SET paper on CIFAR-10: 3072-4000-1000-4000-10."""
    return nn.Sequential(
        nn.Flatten(), mlp((3072, 4000, 1000, 4000, 10), lambda i, o, _: nn.Linear(i, o))
    )


def resnet18(classes: int = 1000) -> nn.Module:
    """ResNet-18 for 224 x 224 images."""
    return images.resnet18((3, 224, 224), classes)

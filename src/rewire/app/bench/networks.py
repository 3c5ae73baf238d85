"""Networks to measure: perceptrons, a layer with a mask, and ResNet-18."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


def resnet18(classes: int = 1000) -> nn.Module:
    """ResNet-18 for 224 x 224 images (He et al. 2016), of torch.nn layers only."""
    stem = [
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    widths = (64, 64, 128, 256, 512)
    blocks: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        blocks += [
            _Block(inputs, outputs, 1 if inputs == outputs else 2),
            _Block(outputs, outputs, 1),
        ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    model = nn.Sequential(*stem, *blocks, *head)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            bound = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            nn.init.normal_(module.weight, std=bound)
    return model

"""Convolutional networks for small images, of `torch.nn` layers only."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from rewire.app.errors import TrainError

__all__ = ["cifar_cnn", "lenet5", "resnet18", "wide_resnet"]

Shape = tuple[int, int, int]  # channels, height, width


def _scaled(size: int, width: float) -> int:
    return max(1, round(size * width))


def _refuse_small(name: str, shape: Shape, least: int) -> None:
    if min(shape[1:]) < least:
        raise TrainError(
            f"--model: {name} needs images of at least {least} x {least} pixels, not "
            f"{shape[1]} x {shape[2]}"
        )


def _classifier(features: int, hidden: tuple[int, int], outputs: int) -> tuple[nn.Module, ...]:
    first, last = nn.Linear(features, hidden[0]), nn.Linear(*hidden)
    return first, nn.ReLU(), last, nn.ReLU(), nn.Linear(hidden[1], outputs)


def lenet5(shape: Shape, outputs: int, width: float = 1.0) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling; 28 x 28 images get a border of 2."""
    channels, height, width_pixels = shape
    _refuse_small("lenet5", shape, 12)
    border = 2 if min(height, width_pixels) == 28 else 0
    first, second = _scaled(6, width), _scaled(16, width)
    hidden = _scaled(120, width), _scaled(84, width)
    rows, cols = (((n + 2 * border - 4) // 2 - 4) // 2 for n in (height, width_pixels))
    return nn.Sequential(
        nn.Conv2d(channels, first, 5, padding=border),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *_classifier(second * rows * cols, hidden, outputs),
    )


def cifar_cnn(shape: Shape, outputs: int, width: float = 1.0) -> nn.Module:
    """The network of TensorFlow's CIFAR-10 tutorial, which DEEP R (Bellec et al. 2018) trains:
    two convolutions of 64 channels, then layers of 384 and 192 units.
    """
    _refuse_small("cifar-cnn", shape, 4)
    channels, height, width_pixels = shape
    maps, hidden = _scaled(64, width), (_scaled(384, width), _scaled(192, width))
    # pooling by 2 with windows of 3, twice; sizes are rounded up
    rows, cols = (math.ceil(math.ceil(n / 2) / 2) for n in (height, width_pixels))
    return nn.Sequential(
        nn.Conv2d(channels, maps, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        nn.LocalResponseNorm(9, alpha=9e-3 / 9, beta=0.75),
        nn.Conv2d(maps, maps, 5, padding=2),
        nn.ReLU(),
        nn.LocalResponseNorm(9, alpha=9e-3 / 9, beta=0.75),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Flatten(),
        *_classifier(maps * rows * cols, hidden, outputs),
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


def resnet18(shape: Shape, outputs: int, width: float = 1.0) -> nn.Module:
    """ResNet-18 (He et al. 2016); for images of up to 64 pixels it begins with a 3x3 convolution
    in place of the 7x7 one and the pooling, which would leave nothing of them.
    """
    widths = [_scaled(n, width) for n in (64, 64, 128, 256, 512)]
    if max(shape[1:]) <= 64:
        stem: list[nn.Module] = [nn.Conv2d(shape[0], widths[0], 3, padding=1, bias=False)]
    else:
        stem = [nn.Conv2d(shape[0], widths[0], 7, 2, padding=3, bias=False)]
    stem += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
    if max(shape[1:]) > 64:
        stem.append(nn.MaxPool2d(3, 2, 1))
    blocks: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths)):
        blocks += [_Block(before, after, 1 if number == 0 else 2), _Block(after, after, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], outputs)]
    model = nn.Sequential(*stem, *blocks, *head)
    _start_convolutions(model)
    return model


class _WideBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        before = F.relu(self.bn1(x))
        # a projection reads what the convolutions read, an identity the input as it is
        around = x if self.shortcut is None else self.shortcut(before)
        inner: Tensor = self.conv2(F.relu(self.bn2(self.conv1(before))))
        return inner + around


def wide_resnet(
    shape: Shape, outputs: int, width: float = 1.0, *, depth: int = 22, widen: int = 2
) -> nn.Module:
    """WRN-depth-widen (Zagoruyko and Komodakis 2016); ``depth`` is 4 more than a multiple of 6."""
    each = (depth - 4) // 6
    widths = [_scaled(16, width), *(_scaled(16 * widen * factor, width) for factor in (1, 2, 4))]
    blocks: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths)):
        blocks.append(_WideBlock(before, after, 1 if number == 0 else 2))
        blocks += [_WideBlock(after, after, 1) for _ in range(each - 1)]
    model = nn.Sequential(
        nn.Conv2d(shape[0], widths[0], 3, padding=1, bias=False),
        *blocks,
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], outputs),
    )
    _start_convolutions(model)
    return model


def _start_convolutions(model: nn.Module) -> None:
    """First values as in He et al. 2015: the variance of gradients is kept."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

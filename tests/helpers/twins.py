"""One example of every layer type in the table of `rewire.nn.convert.kinds`, for tests of what
holds for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewire.nn import SparseWeight
from rewire.nn.convert.kinds import KINDS, Kind

#: By the name of the dense class: how to make one, and arguments for its forward pass.
EXAMPLES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "Linear": (lambda: nn.Linear(6, 4), ((3, 6),)),
    "Conv1d": (lambda: nn.Conv1d(2, 4, 3, padding=1), ((3, 2, 5),)),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), ((3, 2, 5, 6),)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1), ((2, 2, 3, 4, 3),)),
    "RNN": (lambda: nn.RNN(3, 4, num_layers=2), ((5, 2, 3),)),
    "GRU": (lambda: nn.GRU(3, 4, bidirectional=True), ((5, 2, 3),)),
    "LSTM": (lambda: nn.LSTM(3, 4, num_layers=2, proj_size=2), ((5, 2, 3),)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2), ((5, 2, 8),) * 3),
}
BY_NAME: dict[str, Kind] = {kind.dense.__name__: kind for kind in KINDS}

#: Attention once more where its weights are not stacked.
EXAMPLES["MultiheadAttention, apart"] = (
    lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4),
    ((5, 2, 8), (5, 2, 6), (5, 2, 4)),
)
NAMES = list(EXAMPLES)


def kind(name: str) -> Kind:
    return BY_NAME[name.partition(",")[0]]


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A dense layer and arguments for it."""
    make, shapes = EXAMPLES[name]
    return make(), tuple(torch.randn(shape) for shape in shapes)


def output(layer: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    """What a layer puts out first."""
    y: Any = layer(*args)
    return y[0] if isinstance(y, tuple) else y


def connections(layer: nn.Module) -> int:
    return sum(w.connections for w in layer.modules() if isinstance(w, SparseWeight))

"""Multi-layer perceptrons, sparse or dense, drawn by one generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rewire.budget import Limits
from rewire.nn.layers.initial import Init
from rewire.nn.layers.linear import SparseLinear

__all__ = ["ONE_THREAD", "perceptron"]

#: Products in a step of a perceptron: a millisecond of work, below which threads cost more than
#: they bring.
ONE_THREAD = 1_000_000


def perceptron(
    shapes: Sequence[tuple[int, int]],
    connections: Sequence[int] | None,
    generator: torch.Generator,
    *,
    bias: bool = True,
    activation: type[nn.Module] = nn.ReLU,
    limits: Limits | None = None,
    init: Init = "auto",
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Linear layers with ``activation`` between them; topology and values come from ``generator``
    alone.

    Args:
        shapes: (outputs, inputs) of each layer, as in its weight.
        connections: of each layer; None for layers of `torch.nn` with the first values that those
            have.
        bias, limits, init, dtype: as in `SparseLinear`; a dense network has no limits and one init.

    O(connections) time and memory, or O(outputs x inputs) for a dense network.
    """
    modules: list[nn.Module] = []
    for number, (outputs, inputs) in enumerate(shapes):
        if modules:
            modules.append(activation())
        if connections is not None:
            layer: nn.Module = SparseLinear(
                inputs,
                outputs,
                bias=bias,
                connections=connections[number],
                limits=limits,
                generator=generator,
                init=init,
                dtype=dtype,
            )
        else:
            layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=dtype)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
        modules.append(layer)
    return nn.Sequential(*modules)

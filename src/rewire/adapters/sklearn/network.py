"""The network of an estimator: built from sizes and budgets, described for a pickle, looked at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rewire import budget
from rewire.budget import Limits
from rewire.nn import SparseLinear

__all__ = ["ACTIVATIONS", "budgets", "describe", "input_connectivity", "rebuild", "shapes_of"]

#: Activation functions by the names that scikit-learn gives them.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "logistic": nn.Sigmoid,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
}
_NAMES = {kind: name for name, kind in ACTIVATIONS.items()}

Shape = tuple[int, int]  # (outputs, inputs), as in a weight


def shapes_of(sizes: Sequence[int]) -> list[Shape]:
    """Weight shapes of a perceptron from the numbers of its inputs, hidden neurons and outputs."""
    return [(after, before) for before, after in pairwise(sizes)]


def budgets(
    shapes: Sequence[Shape], density: float | None, connections: int | None, distribution: str
) -> list[int]:
    """Connections of each layer. Raises ValueError where there is not at least one a layer."""
    size = sum(rows * cols for rows, cols in shapes)
    total = budget.allowed(size, connections, density)
    if connections is None:
        total = max(total, len(shapes))  # a small network gets one connection a layer
    return budget.distribute(distribution, shapes, total)


def describe(network: nn.Module) -> list[list[Any]]:
    """The layers of a perceptron, however its method changed them, for `rebuild`.

    Raises TypeError for a layer of another kind.
    """
    found: list[list[Any]] = []
    for module in network.children():
        if type(module) in _NAMES:
            found.append([_NAMES[type(module)]])
        elif isinstance(module, SparseLinear):
            weight = module.weight
            limits = None if weight.limits is None else list(weight.limits.as_numbers())
            sizes = [module.in_features, module.out_features]
            found.append(["sparse", *sizes, weight.connections, weight.capacity, limits])
        elif type(module) is nn.Linear:
            found.append(
                ["dense", module.in_features, module.out_features, module.bias is not None]
            )
        else:
            raise TypeError(f"an estimator with a {type(module).__name__} cannot be pickled")
    return found


def rebuild(layers: Sequence[Sequence[Any]], dtype: torch.dtype) -> nn.Sequential:
    """A network with the layers that `describe` found, ready for `load_state_dict`."""
    modules: list[nn.Module] = []
    generator = torch.Generator().manual_seed(0)
    for kind, *numbers in layers:
        if kind in ACTIVATIONS:
            modules.append(ACTIVATIONS[kind]())
        elif kind == "sparse":
            inputs, outputs, connections, capacity, limits = numbers
            modules.append(
                SparseLinear(
                    inputs,
                    outputs,
                    connections=connections,
                    capacity=capacity,
                    limits=None if limits is None else Limits.from_numbers(limits),
                    generator=generator,
                    dtype=dtype,
                )
            )
        else:
            inputs, outputs, bias = numbers
            modules.append(nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=dtype))
    return nn.Sequential(*modules)


def input_connectivity(network: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Of each input: how many connections leave it, and the sum of their magnitudes.

    Two arrays of the length of the inputs, int64 and float64. O(connections) time and memory, or
    O(inputs x outputs) for a dense layer.
    """
    first = next(iter(network.children()))
    if isinstance(first, SparseLinear):
        weight = first.weight
        active = weight.rows >= 0
        cols = weight.cols[active].long()
        magnitude = weight.values.detach()[active].abs().double()
        strength = torch.zeros(first.in_features, dtype=torch.float64).index_add_(
            0, cols, magnitude
        )
        return weight.fan_out().numpy(), strength.numpy()
    assert isinstance(first, nn.Linear)
    dense: Tensor = first.weight.detach()
    return (dense != 0).sum(0).numpy(), dense.abs().double().sum(0).numpy()

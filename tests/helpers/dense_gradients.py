"""The gradients of all positions by autograd on the dense twin, and the connections by number."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rewire.nn import SparseWeight, densify, sparse_weights


def keys(weight: SparseWeight, slots: Tensor | None = None) -> set[int]:
    slots = weight.active() if slots is None else slots
    return set(
        (weight.rows[slots].long() * weight.matrix_shape[1] + weight.cols[slots].long()).tolist()
    )


def dense_gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Of all positions, by autograd on the dense twin; summed over the batches."""
    twin = densify(copy.deepcopy(model))
    for x, y in batches:
        nn.functional.cross_entropy(twin(x), y).backward()
    found = dict(twin.named_parameters())
    packed = found.get("body.in_proj_weight")  # of torch's attention
    if packed is not None:
        for name, part in zip("qkv", packed.grad.chunk(3), strict=True):
            found[f"body.{name}_proj_weight"] = nn.Parameter(part)
            found[f"body.{name}_proj_weight"].grad = part
    return {name: found[name].grad.reshape(w.matrix_shape) for name, w in sparse_weights(model)}


def batches(n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 12, generator=g, dtype=torch.float64),
            torch.randint(0, 6, (8,), generator=g),
        )
        for _ in range(n)
    ]

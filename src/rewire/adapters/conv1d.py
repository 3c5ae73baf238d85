"""GPT-2's layers as layers of torch."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["conv1d_to_linear"]


def conv1d_to_linear(model: nn.Module) -> nn.Module:
    """Replace each ``Conv1D`` of transformers, of which GPT-2 is made, by `torch.nn.Linear`, in
    place; returns the model.

    A Conv1D is a linear layer that keeps its weight transposed; `rewire.sparsify` does not know it.
    The model computes the same afterwards. Weights are copied and transposed, biases stay the same
    objects. Do this before you make the optimizer.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is Conv1D:
                setattr(parent, name, _linear(layer))
    return model


def _linear(layer: Any) -> nn.Linear:
    weight = layer.weight
    inputs, outputs = weight.shape
    made: nn.Linear = nn.utils.skip_init(
        nn.Linear, inputs, outputs, device=weight.device, dtype=weight.dtype
    )
    made.weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    made.bias = layer.bias
    made.train(layer.training)
    return made

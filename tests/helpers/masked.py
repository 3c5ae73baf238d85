"""Small dense models of every layer type that can be cut, and how they train under masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.nn.convert.cut import dense_weights


class Recurrent(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x.view(-1, 3, 4))[0].sum(1))
        return out


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.head = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 4)
        other = x if self.attention.kdim == 4 else torch.cat([x, x[..., :1]], -1)
        out: Tensor = self.head(self.attention(x, other, x)[0].sum(1))
        return out


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 6)),
        nn.Conv1d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Unflatten(2, (2, 3)),
        nn.Conv2d(4, 6, (1, 3), padding=(0, 1), stride=(1, 2), groups=2).to(
            memory_format=torch.channels_last
        ),
        nn.Tanh(),
        nn.Unflatten(2, (1, 2)),
        nn.Conv3d(6, 6, (1, 2, 2), bias=False),
        nn.Flatten(),
    )


#: (batch, 12) -> (batch, 6), every type that can be cut.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6, bias=False)),
    "conv": convolutions,
    "rnn": lambda: Recurrent(nn.RNN(4, 4, bidirectional=True, batch_first=True)),
    "gru": lambda: Recurrent(nn.GRU(4, 8, num_layers=2, batch_first=True)),
    "lstm": lambda: Recurrent(nn.LSTM(4, 10, proj_size=8, batch_first=True)),
    "attention": Attention,
    "attention-kdim": lambda: Attention(kdim=5, add_bias_kv=True),
}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "adam": ("Adam", {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
    "adamw-fused": ("AdamW", {"lr": 0.01, "fused": True}),
    "adamax": ("Adamax", {"lr": 0.01}),
    "nadam": ("NAdam", {"lr": 0.01}),
    "radam": ("RAdam", {"lr": 0.01}),
    "rmsprop": ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "rprop": ("Rprop", {"lr": 0.01}),
    "adagrad": ("Adagrad", {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "adadelta": ("Adadelta", {"lr": 1.0}),
    "asgd": ("ASGD", {"lr": 0.05, "t0": 1}),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(5)
    return MODELS[name]().to(dtype)


def masks_of(model: nn.Module, density: float = 0.4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        name: torch.rand(w.shape, generator=generator) < density
        for name, _, _, w in dense_weights(model)
    }


def train(
    model: nn.Module, optimizer: Optimizer, steps: range, masked: Mapping[str, Tensor] | None = None
) -> None:
    """Data are a function of the step. ``masked``: gradients and weights outside of the masks are
    kept at 0.
    """
    weights = {name: w for name, _, _, w in dense_weights(model)}
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 6, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for name, mask in (masked or {}).items():
            gradient_of(weights[name])[~mask] = 0
        for name, p in model.named_parameters():
            if name.endswith("in_proj_bias") and p.grad is not None:
                # of the keys: 0 but for rounding, of which Rprop would take the sign
                p.grad[4:8] = 0
        optimizer.step()
        with torch.no_grad():
            for name, mask in (masked or {}).items():
                weights[name][~mask] = 0


def gradient_of(weight: Tensor) -> Tensor:
    """A weight's part of its parameter's gradient, as a view."""
    if weight._base is None:
        assert weight.grad is not None
        return weight.grad
    gradient = weight._base.grad
    assert gradient is not None
    return gradient[weight.storage_offset() // weight.shape[1] :][: weight.shape[0]]

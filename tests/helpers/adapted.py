"""A network with all that `rewire.adapt` takes, and a training of its differences."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewire


class Network(nn.Module):
    """Convolutions of all kinds, a norm, linear layers, and a head that shares its weight with the
    embedding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.mix = nn.Conv1d(16, 16, 3, padding="same", groups=2, padding_mode="circular")
        self.picture = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
        self.volume = nn.Conv3d(1, 2, (1, 3, 3), dilation=(1, 1, 2))
        self.norm = nn.BatchNorm1d(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.mix(self.embedding(ids).transpose(1, 2)))
        x = x + self.picture(x.unsqueeze(1)).mean((1, 2, 3)).view(-1, 1, 1)
        x = x + self.volume(x.view(len(x), 1, 2, 8, -1)).mean((1, 2, 3, 4)).view(-1, 1, 1)
        x = x.transpose(1, 2)
        out: Tensor = self.head(x + self.down(F.gelu(self.up(x))))
        return out


def ids(batch: int = 6, steps: int = 8) -> Tensor:
    return torch.randint(0, 12, (batch, steps), generator=torch.Generator().manual_seed(1))


def network(dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(0)
    return Network().to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1).float(), x.roll(-1, 1).flatten())


def train(model: nn.Module, adapter: rewire.Adapter, name: str = "rigl", steps: int = 6) -> None:
    optimizer = torch.optim.Adam(adapter.parameters(), 0.05)
    options = {} if name == "static" else {"every": 2}
    method = rewire.methods.create(name, model, optimizer, seed=3, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, ids()).backward()
        optimizer.step()
        method.step()
    method.finalize()

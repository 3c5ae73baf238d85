"""Networks for sequences: a bidirectional LSTM and a causal Transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

__all__ = ["GPT", "BidirectionalLSTM", "lengths"]


def lengths(x: Tensor) -> Tensor:
    """Steps of each padded sequence of (batch, steps, features): up to the last that is not all 0.

    A sequence of zeros alone has one step.
    """
    used = (x != 0).any(2)
    steps = torch.arange(1, x.shape[1] + 1, device=x.device)
    return (used * steps).amax(1).clamp_min(1)


class BidirectionalLSTM(nn.Module):
    """An LSTM that reads (batch, steps, features) in both directions, and a linear layer.

    Steps of zeros at the end of a sequence are padding: no direction reads them.

    Args:
        features: numbers of one step.
        outputs: of the linear layer.
        units: of each direction.
        each_step: give (batch, steps, outputs), one for each step, instead of (batch, outputs) for
            the mean over the steps.
    """

    def __init__(self, features: int, outputs: int, units: int, *, each_step: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, units, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * units, outputs)
        self.each_step = each_step

    def forward(self, x: Tensor) -> Tensor:
        """(batch, steps, features) -> (batch, outputs) or (batch, steps, outputs)."""
        steps = lengths(x)
        packed = pack_padded_sequence(
            x[:, : int(steps.max())], steps.cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = pad_packed_sequence(
            self.lstm(packed)[0],
            batch_first=True,
            total_length=x.shape[1] if self.each_step else None,
        )
        if not self.each_step:
            states = states.sum(1) / steps.unsqueeze(1)  # states beyond the end are 0
        out: Tensor = self.head(states)
        return out


class _Attention(nn.Module):
    """Causal attention whose four products are ordinary linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        parts = self.qkv(x).view(batch, steps, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, steps, width))
        return out


class _Block(nn.Module):
    """Attention and a perceptron, each added to what passes by."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class GPT(nn.Module):
    """A causal Transformer over tokens (Radford et al. 2019), of linear layers that can be sparse.

    Args:
        steps: most tokens of a sequence.
        tokens: how many different ones there are, and outputs at each step.
        layers, width: blocks, and numbers that each passes on.
        heads: by default one for every 64 numbers.
    """

    def __init__(
        self, steps: int, tokens: int, layers: int, width: int, heads: int | None = None
    ) -> None:
        super().__init__()
        if heads is None:
            heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(steps, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # what is added to the stream of each block counts 2 times the layers
                added = name.endswith(("out", "down"))
                nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if added else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (batch, steps) -> (batch, steps, tokens)."""
        places = self.places(torch.arange(x.shape[1], device=x.device))
        out: Tensor = self.head(self.norm(self.blocks(self.tokens(x) + places)))
        return out

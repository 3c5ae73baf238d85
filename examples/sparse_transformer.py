"""Train a small Transformer with 20 % of its connections; RigL finds which ones.

    python examples/sparse_transformer.py

The task is made up and needs attention: one of 16 symbols stands twice in a sequence of 8, all
others once; which one is it?
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewire

SYMBOLS, LENGTH, WIDTH, STEPS = 16, 8, 64, 400


def sequences(count: int) -> tuple[Tensor, Tensor]:
    """Sequences (count, LENGTH) of symbols, and the symbol (count,) that each has twice."""
    x = torch.rand(count, SYMBOLS).argsort(1)[:, :LENGTH]
    y = x[:, 0].clone()
    x[:, 1] = y
    order = torch.rand(count, LENGTH).argsort(1)
    return x.gather(1, order), y


class Transformer(nn.Module):
    """Reads a sequence of symbols and names one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x)).amax(1))


torch.manual_seed(0)
model = Transformer()
# Attention and both linear layers of each block become sparse; the small head stays dense.
rewire.sparsify(model, density=0.2, only=["body.*"])
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
method = rewire.methods.RigL(model, optimizer, every=50)

for step in range(STEPS):
    x, y = sequences(64)
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    method.step()
    if (step + 1) % 100 == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}")
model = method.finalize().eval()

x, y = sequences(1000)
accuracy = (model(x).argmax(1) == y).float().mean().item()
print(rewire.summary(model))
print(f"accuracy on new sequences {100 * accuracy:.1f} %")

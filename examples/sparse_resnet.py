"""Make a ResNet of your own sparse, in place, and train it with SET.

    python examples/sparse_resnet.py

The data are the 1,797 digits of 8 x 8 pixels that come with the package.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewire
from rewire.app.data import load


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(out)))


class ResNet(nn.Module):
    """A first convolution, two blocks, a classifier."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.Sequential(Block(channels), nn.MaxPool2d(2), Block(channels))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


torch.manual_seed(0)
digits = load("digits")
train_x, test_x = digits.train_x.view(-1, 1, 8, 8), digits.test_x.view(-1, 1, 8, 8)

model = ResNet()
# The first and the last layer are small and stay dense; the others get 20 % of their connections.
rewire.sparsify(model, density=0.2, exclude=["stem", "head"])
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
method = rewire.methods.SET(model, optimizer)

epochs = 6
for epoch in range(epochs):
    for batch in torch.randperm(len(train_x)).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(train_x[batch]), digits.train_y[batch]).backward()
        optimizer.step()
        method.step()
    method.end_epoch(last=epoch == epochs - 1)
model = method.finalize().eval()

accuracy = (model(test_x).argmax(1) == digits.test_y).float().mean().item()
print(rewire.summary(model))
print(f"test accuracy {100 * accuracy:.1f} %")

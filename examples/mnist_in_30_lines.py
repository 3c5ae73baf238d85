"""Train a network with 5 % of its connections on MNIST; RigL finds which ones.

    python examples/mnist_in_30_lines.py [folder with MNIST's four idx files]

Without a folder the data are the 1,797 digits of 8 x 8 pixels that come with the package.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import rewire
from rewire.app.data import load

torch.manual_seed(0)
data = load("mnist", data_dir=Path(sys.argv[1])) if len(sys.argv) > 1 else load("digits")
model = torch.nn.Sequential(
    torch.nn.Linear(data.train_x.shape[1], 300), torch.nn.ReLU(), torch.nn.Linear(300, 10)
)
rewire.sparsify(model, density=0.05)  # before the optimizer is made
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
method = rewire.methods.RigL(model, optimizer, every=50)
train = torch.utils.data.TensorDataset(data.train_x, data.train_y)
for epoch in range(5):
    for x, y in torch.utils.data.DataLoader(train, batch_size=32, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        method.step()
    method.end_epoch(last=epoch == 4)
model = method.finalize()

accuracy = (model(data.test_x).argmax(1) == data.test_y).float().mean().item()
print(rewire.summary(model))
print(f"{data.name}: test accuracy {100 * accuracy:.1f} %")

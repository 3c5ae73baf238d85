"""Make a trained dense network smaller: NoiseOut merges neurons that say the same.

    pip install 'torch-rewire[prune]'
    python examples/noiseout_on_a_trained_network.py

The data are the 1,797 digits of 8 x 8 pixels that come with the package.
"""

import torch
import torch.nn.functional as F
from torch import nn

import rewire
from rewire.app.data import load

torch.manual_seed(0)
digits = load("digits")
order = torch.randperm(len(digits.train_x))
train_x, train_y = digits.train_x[order[:-200]], digits.train_y[order[:-200]]
held_out_x, held_out_y = digits.train_x[order[-200:]], digits.train_y[order[-200:]]


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def report(what: str, model: nn.Module) -> None:
    neurons = [layer.out_features for layer in model if isinstance(layer, nn.Linear)]
    parameters = sum(p.numel() for p in model.parameters())
    score = 100 * accuracy(model, digits.test_x, digits.test_y)
    print(f"{what}: {neurons} neurons, {parameters} parameters, test accuracy {score:.1f} %")


# A network that was trained without rewire.
model = nn.Sequential(
    nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 40), nn.ReLU(), nn.Linear(40, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
for _epoch in range(10):
    for batch in torch.randperm(len(train_x)).split(32):
        optimizer.zero_grad()
        F.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
        optimizer.step()
report("before", model)

# It goes on training while neurons are merged, as long as it gets 93 % of the held-out digits.
loader = [(train_x[i : i + 32], train_y[i : i + 32]) for i in range(0, len(train_x), 32)]
method = rewire.methods.NoiseOut(
    model, optimizer, data=loader, required_score=0.93, criterion="damage", pace=0.1
)
for _epoch in range(10):
    for x, y in loader:
        loss = F.cross_entropy(model(x), y) + method.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.step()
    method.end_epoch(lambda network: accuracy(network, held_out_x, held_out_y))
model = method.finalize()  # the last network that reached 93 %, in plain torch.nn
report("after", model)

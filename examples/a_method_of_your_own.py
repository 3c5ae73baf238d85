"""A method of your own: a rule of your own for what to drop, random growth, SET's schedule.

    python examples/a_method_of_your_own.py

The data are the 1,797 digits of 8 x 8 pixels that come with the package. The page "Write a method"
of the documentation explains each part.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import rewire
from rewire.app.data import load
from rewire.methods import Rewiring, parameter, register
from rewire.methods.criteria.drop import Drop, smallest
from rewire.methods.criteria.grow import Random


@dataclass(frozen=True)
class ByShareOfTheNeuron(Drop):
    """Drop connections that are small beside the others of their neuron."""

    def __call__(self, pool, fraction):
        weight, slots = pool.weight, pool.weight.active()
        size, rows = weight.values[slots].abs(), weight.rows[slots].long()
        whole = torch.zeros(weight.matrix_shape[0]).index_add(0, rows, size)
        share = size / whole[rows].clamp(min=1e-12)
        return smallest(slots, share, int(fraction * slots.numel()))


@register(
    name="by-share",
    paper="examples/a_method_of_your_own.py",
    summary="drops what is small beside the other inputs of a neuron, grows at random",
    keeps_budget="every step",
    guarantees=("K exact in every layer at every moment",),
)
class ByShare(Rewiring):
    """Drop by the share in a neuron's inputs, grow at random."""

    fraction: float = parameter(default=0.2, low=0, high=1, help="share of connections to replace")

    drop = ByShareOfTheNeuron()
    grow = Random()


torch.manual_seed(0)
digits = load("digits")
for name in ("static", "by-share"):  # from now on it is a method like any other
    model = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
    rewire.sparsify(model, density=0.03)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = rewire.methods.create(name, model, optimizer)
    epochs = 6
    for epoch in range(epochs):
        for batch in torch.randperm(len(digits.train_x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train_x[batch]), digits.train_y[batch]).backward()
            optimizer.step()
            method.step()
        method.end_epoch(last=epoch == epochs - 1)
    model = method.finalize()
    accuracy = (model(digits.test_x).argmax(1) == digits.test_y).float().mean().item()
    print(f"{name}: test accuracy {100 * accuracy:.1f} %")

"""The training loop of the estimators, and its state as bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from joblib import cpu_count
from torch import Tensor, nn

from rewire import methods
from rewire.adapters.sklearn.data import Rows
from rewire.adapters.sklearn.network import describe, rebuild
from rewire.nn.layers.perceptron import ONE_THREAD
from rewire.storage.nested import pack, unpack

__all__ = ["Training", "from_bytes", "threads", "to_bytes"]

Loss = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def threads(wanted: int | None, products: int) -> Iterator[None]:
    """Compute with ``wanted`` threads inside the ``with``.

    None stands for torch's number, or for one where a step has few ``products``. A negative number
    counts down from all cores, as in joblib.
    """
    before = torch.get_num_threads()
    if wanted is None:
        count = 1 if products < ONE_THREAD else before
    else:
        count = wanted if wanted > 0 else max(1, cpu_count() + 1 + wanted)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Training:
    """A network in training: it, its optimizer, its method, and the number of epochs so far.

    loss: (outputs, targets) -> loss of each sample, (samples,).
    seed: draws the order of the samples.
    """

    def __init__(
        self,
        network: nn.Sequential,
        optimizer: torch.optim.Optimizer,
        method: methods.Method,
        loss: Loss,
        seed: int,
    ) -> None:
        self.network, self.optimizer, self.method = network, optimizer, method
        self.loss, self.seed = loss, seed
        self.epochs = 0

    def order(self, count: int, shuffle: bool) -> Tensor:
        """The order of the samples in this epoch."""
        if not shuffle:
            return torch.arange(count)
        generator = torch.Generator().manual_seed((self.seed + 7919 * self.epochs) % 2**63)
        return torch.randperm(count, generator=generator)

    def epoch(
        self, x: Rows, y: Tensor, weight: Tensor | None, batch_size: int, shuffle: bool
    ) -> float:
        """Go through the data once; return the mean loss. The caller ends the epoch of the method.

        weight: of each sample, with a mean of 1; None for equal ones.
        """
        self.network.train()
        total = torch.zeros((), dtype=torch.float64)
        for chosen in self.order(len(x), shuffle).split(batch_size):
            losses = self.loss(self.network(x.take(chosen)), y[chosen])
            loss = losses.mean() if weight is None else (losses * weight[chosen]).mean()
            self.optimizer.zero_grad()
            (loss + self.method.penalty()).backward()
            self.optimizer.step()
            self.method.step()
            total += loss.detach().double() * len(chosen)
        self.epochs += 1
        return float(total) / max(len(x), 1)

    def state(self) -> dict[str, Any]:
        """All that a training needs to go on from here, except the network."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "epochs": self.epochs,
            "seed": self.seed,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on as the training whose `state` this is; the network has been loaded before."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.epochs, self.seed = int(state["epochs"]), int(state["seed"])


def to_bytes(network: nn.Module, training: Mapping[str, Any] | None) -> bytes:
    """The network, and the `Training.state` of its training, as the content of a safetensors
    file.
    """
    state = {
        "layers": describe(network),
        "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
        "network": dict(network.state_dict()),
        "training": training,
    }
    return pack(state)


def from_bytes(content: bytes) -> tuple[nn.Sequential, Mapping[str, Any] | None]:
    """The network that `to_bytes` was given, and the state of its training."""
    state = unpack(content, "the pickled estimator")
    network = rebuild(state["layers"], getattr(torch, state["dtype"]))
    network.load_state_dict(state["network"])
    return network.eval(), state["training"]

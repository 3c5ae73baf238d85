"""Differentiable sparsification learns structure: channels, depth, heads; accuracy against size.

    python benchmarks/differentiable.py --data-dir FASHION_MNIST --cifar CIFAR_10_BATCHES_PY
        [--only channels] [--out docs/results/differentiable.json]

channels: a CIFAR-10 CNN (32-64-64 channels, BatchNorm), gates behind each BatchNorm.
depth:    a residual network of 8 branches on Fashion-MNIST, one gate vector over the branches.
heads:    a two-layer Transformer encoder on strips of Fashion-MNIST's images, gates on its 2 x 8 heads.

Each is trained with several strengths of the penalty (0: no gates), then finalized; accuracy is that of the finalized
network on the test set, parameters and multiply-adds are counted in it. One seed, one thread, no fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cifar import cifar10
from torch import Tensor, nn

import rewire
from rewire import data
from rewire.methods import Differentiable

Split = tuple[Tensor, Tensor, Tensor, Tensor]


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, last in ((3, 32, False), (32, 64, False), (64, 64, True)):
        pool = nn.AdaptiveAvgPool2d(1) if last else nn.MaxPool2d(2)
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), pool]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


class Deep(nn.Module):
    """784-128, then 8 residual branches 128-64-128, then 10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(784, 128)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128)) for _ in range(8)
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for branch in self.branches:
            x = x + branch(torch.relu(x))
        y: Tensor = self.head(torch.relu(x))
        return y


class Rows(nn.Module):
    """A Transformer encoder that reads an image as 7 strips of 4 rows; two layers of 8 heads, width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(112, 64)
        self.place = nn.Parameter(0.02 * torch.randn(7, 64))
        self.attention = nn.ModuleList(nn.MultiheadAttention(64, 8, batch_first=True) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(64) for _ in range(4))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.view(-1, 7, 112)) + self.place
        for i in range(2):
            h = self.norm[2 * i](x)
            x = x + self.attention[i](h, h, h, need_weights=False)[0]
            x = x + self.mlp[i](self.norm[2 * i + 1](x))
        y: Tensor = self.head(x.mean(1))
        return y


@dataclass(frozen=True)
class Experiment:
    """A network, what of it is gated, the strengths to try, and how it is trained (Adam, batches of 100, cosine)."""

    build: Callable[[], nn.Module]
    options: dict[str, Any]
    strengths: tuple[float, ...]
    epochs: int
    samples: int
    rate: float


EXPERIMENTS = {
    "channels": Experiment(cnn, {"units": ["1", "5", "9"], "normalise": True}, (0.0, 0.01, 0.03, 0.1), 12, 5000, 5e-3),
    "depth": Experiment(Deep, {"branches": "branches.*"}, (0.0, 1e-3, 3e-3, 1e-2, 3e-2), 20, 10000, 2e-3),
    "heads": Experiment(Rows, {"heads": "attention.*"}, (0.0, 1e-3, 3e-3, 1e-2), 15, 10000, 2e-3),
}


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum(int((model(x[i : i + 500]).argmax(1) == y[i : i + 500]).sum()) for i in range(0, len(y), 500))
    return right / len(y)


def run(name: str, experiment: Experiment, split: Split, strength: float) -> dict[str, Any]:
    x, y, test_x, test_y = split
    torch.manual_seed(0)
    model = experiment.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=experiment.rate)
    steps = experiment.epochs * (len(y) // 100)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    method = (
        Differentiable(model, optimizer, strength=strength, initial=0.5, seed=0, **experiment.options)
        if strength
        else None
    )
    begun = time.perf_counter()
    for _ in range(experiment.epochs):
        model.train()
        for batch in torch.randperm(len(y)).split(100):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            if method is not None:
                loss = loss + method.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if method is not None:
                method.step()
            scheduler.step()
    seconds = time.perf_counter() - begun
    on = method.stats()["components"] if method is not None else None
    gated = accuracy(model, test_x, test_y)
    if method is not None:
        method.finalize()
    size = rewire.nn.cost(model, test_x[:2])
    result = {
        "strength": strength,
        "components": on,
        "test_accuracy": accuracy(model, test_x, test_y),
        "test_accuracy_before_finalize": gated,
        "parameters": size.parameters,
        "bytes": size.bytes,
        "multiply_adds": size.multiply_adds,
        "seconds": round(seconds, 1),
    }
    print(name, json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--cifar", type=Path, required=True, help="folder cifar-10-batches-py")
    parser.add_argument("--only", choices=list(EXPERIMENTS))
    parser.add_argument("--out", type=Path, help="results of other experiments there are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    for name, experiment in EXPERIMENTS.items():
        if options.only not in (None, name):
            continue
        n = experiment.samples
        if name == "channels":
            split = cifar10(options.cifar, n)
        else:
            found = data.load("fashion-mnist", data_dir=options.data_dir)
            split = found.train_x[:n], found.train_y[:n], found.test_x, found.test_y
        setting = {k: v for k, v in asdict(experiment).items() if k in ("options", "epochs", "samples", "rate")}
        runs = [run(name, experiment, split, strength) for strength in experiment.strengths]
        results[name] = {"setting": setting, "runs": runs}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

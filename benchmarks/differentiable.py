"""Differentiable sparsification learns structure: channels, depth, heads; accuracy against size.

    python benchmarks/differentiable.py --data-dir FASHION_MNIST --cifar CIFAR_10_BATCHES_PY
        [--only channels] [--epochs 8] [--train 10000] [--out docs/results/differentiable.json]

channels: a CIFAR-10 CNN (32-64-64 channels, BatchNorm), gates behind each BatchNorm.
depth:    a residual network of 8 branches on Fashion-MNIST, one gate vector over the branches.
heads:    a two-layer Transformer encoder on the rows of Fashion-MNIST, gates on its 2 x 8 heads.

Each is trained with several strengths of the penalty (0: no gates), then finalized; accuracy is that of the finalized
network on the test set, parameters and multiply-adds are counted in it. One seed, one thread, no fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
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
    """A Transformer encoder that reads an image as 28 rows of 28 pixels; two layers of 8 heads, width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(28, 64)
        self.place = nn.Parameter(0.02 * torch.randn(28, 64))
        self.attention = nn.ModuleList(nn.MultiheadAttention(64, 8, batch_first=True) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(64) for _ in range(4))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.view(-1, 28, 28)) + self.place
        for i in range(2):
            h = self.norm[2 * i](x)
            x = x + self.attention[i](h, h, h, need_weights=False)[0]
            x = x + self.mlp[i](self.norm[2 * i + 1](x))
        y: Tensor = self.head(x.mean(1))
        return y


#: Experiment -> (network, what is gated, strengths).
RUNS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[float]]] = {
    "channels": (cnn, {"units": ["1", "5", "9"]}, [0.0, 3e-4, 1e-3, 3e-3]),
    "depth": (Deep, {"branches": "branches.*"}, [0.0, 1e-3, 3e-3, 1e-2, 3e-2]),
    "heads": (Rows, {"heads": "attention.*"}, [0.0, 3e-3, 3e-2]),
}


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum(int((model(x[i : i + 500]).argmax(1) == y[i : i + 500]).sum()) for i in range(0, len(y), 500))
    return right / len(y)


def run(name: str, split: Split, strength: float, epochs: int) -> dict[str, Any]:
    build, targets, _ = RUNS[name]
    x, y, test_x, test_y = split
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = epochs * (len(y) // 100)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    method = Differentiable(model, optimizer, strength=strength, initial=0.5, seed=0, **targets) if strength else None
    begun = time.perf_counter()
    for _ in range(epochs):
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
    parser.add_argument("--only", choices=list(RUNS))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--train", type=int, default=10000, help="training samples")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in [options.only] if options.only else list(RUNS):
        if name == "channels":
            split = cifar10(options.cifar, options.train)
        else:
            found = data.load("fashion-mnist", data_dir=options.data_dir)
            n = options.train
            split = found.train_x[:n], found.train_y[:n], found.test_x, found.test_y
        results[name] = [run(name, split, strength, options.epochs) for strength in RUNS[name][2]]
    if options.out:
        before = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
        setting = {"epochs": options.epochs, "training_samples": options.train, "optimizer": "Adam 2e-3, cosine"}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"setting": setting, "results": before | results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Differentiable sparsification learns structure: channels, depth, heads; accuracy against size.

    python benchmarks/differentiable.py --data-dir FASHION_MNIST --cifar CIFAR_10_BATCHES_PY
        [--only channels] [--out docs/results/differentiable.json] [--picture
        docs/results/differentiable.svg]

channels: a CIFAR-10 CNN (32-64-64 channels, BatchNorm), gates behind each BatchNorm.
depth:    a residual network of 8 branches on Fashion-MNIST, one gate vector over the branches.
heads:    a two-layer Transformer encoder on strips of Fashion-MNIST's images, gates on its heads.

Each is trained with several strengths of the penalty, finalized after two thirds of the epochs, and
what is left trains on with the same optimizer and schedule, without a penalty. Beside them stand
networks without gates, trained as long: as large as the others start (scale 1), and smaller ones
made by hand (fewer channels, fewer branches). Accuracy is that of the last epoch's network on the
test set; parameters and multiply-adds are counted in it. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cifar import cifar10
from torch import Tensor, nn

import rewire
from rewire.app import data
from rewire.methods import Differentiable

Split = tuple[Tensor, Tensor, Tensor, Tensor]
GATED = 2 / 3  # of the epochs; the others train what is left
GATES, HAND = "#1f6fb2", "#c8452d"  # colours of the picture


def cnn(scale: float = 1) -> nn.Module:
    layers: list[nn.Module] = []
    a, b, c = (round(scale * width) for width in (32, 64, 64))
    for inputs, outputs, last in ((3, a, False), (a, b, False), (b, c, True)):
        pool = nn.AdaptiveAvgPool2d(1) if last else nn.MaxPool2d(2)
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            pool,
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(c, 10))


class Deep(nn.Module):
    """784-128, then 8 (times ``scale``) residual branches 128-64-128, then 10."""

    def __init__(self, scale: float = 1) -> None:
        super().__init__()
        self.stem = nn.Linear(784, 128)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
            for _ in range(round(8 * scale))
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for branch in self.branches:
            x = x + branch(torch.relu(x))
        y: Tensor = self.head(torch.relu(x))
        return y


class Rows(nn.Module):
    """A Transformer encoder that reads an image as 7 strips of 4 rows; two layers of 8 heads, width
    64.
    """

    def __init__(self, scale: float = 1) -> None:
        super().__init__()
        assert scale == 1  # there is no smaller one to compare with
        self.embed = nn.Linear(112, 64)
        self.place = nn.Parameter(0.02 * torch.randn(7, 64))
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(64, 8, batch_first=True) for _ in range(2)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(64) for _ in range(4))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(2)
        )
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
    """A network, what of it is gated, the strengths to try, and how it is trained (Adam, batches of
    100, cosine).
    """

    build: Callable[[float], nn.Module]
    scales: tuple[float, ...]  # of the networks without gates, made by hand
    options: Mapping[str, Any]
    strengths: tuple[float, ...]
    epochs: int
    samples: int
    rate: float
    seeds: int
    flips: bool = False


EXPERIMENTS = {
    "channels": Experiment(
        cnn,
        (1, 0.5, 0.25),
        {"units": ["1", "5", "9"], "normalise": True},
        (3e-3, 5e-3, 0.01),
        24,
        10000,
        5e-3,
        seeds=1,  # an epoch takes ten times as long as one of the others
        flips=True,
    ),
    "depth": Experiment(
        Deep,
        (1, 0.5, 0.25, 0.125),
        {"branches": "branches.*"},
        (3e-3, 1e-2, 3e-2),
        21,
        10000,
        2e-3,
        seeds=3,
    ),
    "heads": Experiment(
        Rows, (1,), {"heads": "attention.*"}, (1e-3, 3e-3, 1e-2), 15, 10000, 2e-3, seeds=2
    ),
}


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(x[i : i + 500]).argmax(1) == y[i : i + 500]).sum())
        for i in range(0, len(y), 500)
    )
    return right / len(y)


def batches(x: Tensor, y: Tensor, flips: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples in a new order, 100 at a time; images mirrored at random if ``flips``."""
    for chosen in torch.randperm(len(y)).split(100):
        part = x[chosen]
        if flips:
            mirrored = torch.rand(len(part), 1, 1, 1) < 0.5
            part = torch.where(mirrored, part.flip(-1), part).contiguous(
                memory_format=torch.channels_last
            )
        yield part, y[chosen]


def run(
    experiment: Experiment, split: Split, seed: int, scale: float, strength: float
) -> dict[str, Any]:
    """One training; ``strength`` 0: without gates."""
    x, y, test_x, test_y = split
    torch.manual_seed(seed)
    model = experiment.build(scale)
    optimizer = torch.optim.Adam(model.parameters(), lr=experiment.rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, experiment.epochs * len(y) // 100
    )
    method = None
    if strength:
        method = Differentiable(
            model, optimizer, strength=strength, initial=0.5, seed=seed, **experiment.options
        )
    result: dict[str, Any] = {"seed": seed, "scale": scale, "strength": strength}
    begun = time.process_time()
    for epoch in range(experiment.epochs):
        if method is not None and epoch == round(experiment.epochs * GATED):
            result |= {
                "components": method.stats()["components"],
                "accuracy_before": accuracy(model, test_x, test_y),
            }
            model = method.finalize()
            result["accuracy_after"] = accuracy(model, test_x, test_y)
            method = None
        model.train()
        for batch_x, batch_y in batches(x, y, experiment.flips):
            loss = nn.functional.cross_entropy(model(batch_x), batch_y)
            if method is not None:
                loss = loss + method.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if method is not None:
                method.step()
            scheduler.step()
    result["seconds"] = round(time.process_time() - begun, 1)
    size = rewire.nn.inspect.cost(model, test_x[:2])
    result |= {"test_accuracy": accuracy(model, test_x, test_y), "parameters": size.parameters}
    return result | {"bytes": size.bytes, "multiply_adds": size.multiply_adds}


def picture(results: dict[str, Any]) -> str:
    """Accuracy against parameters of every run, a panel for each experiment, as SVG."""
    width, height, left, top = 250, 220, 52, 54
    whole = len(results) * (width + left) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {height + top + 48}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for column, (name, experiment) in enumerate(results.items()):
        parts += _panel(
            name, experiment["runs"], column * (width + left) + left, top, width, height
        )
    kinds = ((GATES, "learned by gates"), (HAND, "without gates, as it is or made smaller by hand"))
    for x, (colour, kind) in zip((left, left + 130), kinds, strict=True):
        parts.append(
            f'<circle cx="{x}" cy="16" r="4" fill="{colour}"/><text x="{x + 9}" '
            f'y="20">{kind}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    name: str, runs: list[dict[str, Any]], left: float, top: float, width: float, height: float
) -> list[str]:
    sizes, scores = (
        [run["parameters"] for run in runs],
        [100 * run["test_accuracy"] for run in runs],
    )
    low, high = math.log(min(sizes) / 1.25), math.log(max(sizes) * 1.25)
    step = 1 if max(scores) - min(scores) < 5 else 5
    floor, ceiling = step * math.floor(min(scores) / step), step * math.ceil(max(scores) / step)
    while ceiling - floor < 5:  # tenths of a percent shall not look like much
        floor, ceiling = floor - 1, ceiling + 1

    def at(size: float, score: float) -> tuple[float, float]:
        x = left + width * (math.log(size) - low) / (high - low)
        return round(x, 1), round(top + height * (ceiling - score) / (ceiling - floor), 1)

    parts = [f'<text x="{left}" y="{top - 12}" font-size="13">{name}</text>']
    for score in range(floor, ceiling + 1, step):
        _, y = at(1, score)
        parts.append(f'<line x1="{left}" y1="{y}" x2="{left + width}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{score} %</text>')
    digits = (1, 2, 5) if high - low > 2 else range(1, 10)
    for size in (m * 10**e for e in range(3, 7) for m in digits):
        if low < math.log(size) < high:
            x, y = at(size, floor)
            parts.append(f'<line x1="{x}" y1="{y}" x2="{x}" y2="{y + 4}" stroke="#888"/>')
            parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{size:,}</text>')
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 34}" '
        'text-anchor="middle">parameters</text>'
    )
    for colour, mine in (
        (HAND, [r for r in runs if not r["strength"]]),
        (GATES, [r for r in runs if r["strength"]]),
    ):
        arms: dict[tuple[float, float], list[dict[str, Any]]] = {}
        for run in mine:
            arms.setdefault((run["scale"], run["strength"]), []).append(run)
        means = [
            tuple(
                statistics.mean(run[key] for run in arm) for key in ("parameters", "test_accuracy")
            )
            for arm in arms.values()
        ]
        line = " ".join("{},{}".format(*at(size, 100 * score)) for size, score in sorted(means))
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-opacity="0.6"/>'
        )
        for run in mine:
            x, y = at(run["parameters"], 100 * run["test_accuracy"])
            parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>')
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="folder of Fashion-MNIST's four files"
    )
    parser.add_argument("--cifar", type=Path, required=True, help="folder cifar-10-batches-py")
    parser.add_argument("--only", choices=list(EXPERIMENTS))
    parser.add_argument("--picture", type=Path, help="accuracy against parameters, as SVG")
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        help="others than the experiment's, without the networks made by hand",
    )
    parser.add_argument("--out", type=Path, help="results of other experiments there are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = (
        json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    )
    for name, experiment in EXPERIMENTS.items():
        if options.only not in (None, name):
            continue
        n = experiment.samples
        if name == "channels":
            split = cifar10(options.cifar, n)
        else:
            found = data.load("fashion-mnist", data_dir=options.data_dir)
            split = found.train_x[:n], found.train_y[:n], found.test_x, found.test_y
        arms = [(scale, 0.0) for scale in experiment.scales] + [
            (1, s) for s in experiment.strengths
        ]
        runs = []
        for scale, strength in arms:
            for seed in range(experiment.seeds):
                runs.append(run(experiment, split, seed, scale, strength))
                print(name, json.dumps(runs[-1]), flush=True)
        setting = {
            "options": experiment.options,
            "epochs": experiment.epochs,
            "gated": GATED,
            "samples": n,
        }
        results[name] = {"setting": setting | {"rate": experiment.rate}, "runs": runs}
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.picture:
        options.picture.write_text(picture(results))


if __name__ == "__main__":
    main()

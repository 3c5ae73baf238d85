"""CosineSET on Madelon in its authors' setting: does the network find the 20 informative features
of 500?

    python benchmarks/madelon.py madelon.mat [--method codacorset] [--seeds 5] [--out
    docs/results/madelon.json]
        [--picture docs/results/madelon.svg]

madelon.mat is that of the scikit-feature repository: 2600 samples, of which the first 2000 are
trained on and the last 600 tested. Three hidden layers of 1000 units, SReLU, dropout 0.3; the
output layer is dense. SET's epsilon 20 gives 30,000 + 40,000 + 40,000 connections. SGD of rate 0.1
and momentum 0.9, all of it reset at each rewiring, batch 100, 100 epochs, zeta 0.3, inputs
standardised (the script that Pieterse & Mocanu released, arXiv 1903.07138v1).

Then inputs are set to 0 one after the other in the order of their connections, ties by their
number, and the test set is scored each time. Needs scipy, for the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from scipy.io import loadmat
from torch import Tensor, nn

from rewire import methods
from rewire.methods.criteria.drop import ByMagnitudeAndSign
from rewire.nn import SparseLinear, SReLU

#: The features that carry the label, alone or in combination, counted from 0, as the authors'
#: script lists them.
INFORMATIVE = [
    *(
        28,
        48,
        64,
        105,
        128,
        153,
        241,
        281,
        318,
        336,
        338,
        378,
        433,
        442,
        451,
        453,
        455,
        472,
        475,
        493,
    )
]
HIDDEN, EPSILON, ZETA, DROPOUT = 1000, 20, 0.3, 0.3
BATCH, RATE, MOMENTUM, TRAINING = 100, 0.1, 0.9, 2000


def load(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised training inputs, labels (0, 1), test inputs, labels."""
    content = loadmat(path)
    x = torch.tensor(content["X"], dtype=torch.float32)
    y = (torch.tensor(content["Y"].ravel()) > 0).long()
    mean, std = x[:TRAINING].mean(0), x[:TRAINING].std(0, unbiased=False)
    x = torch.where(std > 0, (x - mean) / std, torch.zeros_like(x))
    return x[:TRAINING], y[:TRAINING], x[TRAINING:], y[TRAINING:]


def build(features: int, generator: torch.Generator) -> nn.Sequential:
    """The authors' network, with Glorot's initial values for the dense shape."""
    layers: list[nn.Module] = []
    for inputs in (features, HIDDEN, HIDDEN):
        layer = SparseLinear(
            inputs,
            HIDDEN,
            connections=EPSILON * (inputs + HIDDEN),
            generator=generator,
            init="dense",
        )
        bound = (6 / (inputs + HIDDEN)) ** 0.5
        nn.init.uniform_(layer.weight.values, -bound, bound, generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, SReLU(HIDDEN, generator=generator), nn.Dropout(DROPOUT)]
    head = nn.Linear(HIDDEN, 2)
    nn.init.xavier_uniform_(head.weight, generator=generator)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, head)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    return (model(x).argmax(1) == y).float().mean().item()


def removal_curve(model: nn.Module, x: Tensor, y: Tensor, order: list[int]) -> list[float]:
    """Accuracy with the first 0, 1, 2, ... inputs of ``order`` set to 0."""
    x = x.clone()
    scores = [accuracy(model, x, y)]
    for feature in order:
        x[:, feature] = 0
        scores.append(accuracy(model, x, y))
    return [round(score, 4) for score in scores]


def run(
    name: str, data: tuple[Tensor, Tensor, Tensor, Tensor], seed: int, epochs: int
) -> dict[str, Any]:
    """One training; connections of every input, accuracies, curves."""
    x, y, test_x, test_y = data
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    model = build(x.shape[1], generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    inputs: dict[str, Any] = {"data": x.split(500)} if methods.info(name).takes_data else {}
    if "centred" in methods.info(name).parameters():  # the data are standardised
        inputs["centred"] = False
    method = methods.create(
        name, model, optimizer, seed=seed, fraction=ZETA, optimizer_state="reset", **inputs
    )
    scores, start = [], time.perf_counter()
    for epoch in range(epochs):
        model.train()
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.step()
        scores.append(accuracy(model, test_x, test_y))
        method.end_epoch(last=epoch + 1 == epochs)
    seconds = time.perf_counter() - start
    pool = method.pools[0]
    fan_out = pool.weight.fan_out()
    weak = ByMagnitudeAndSign()(pool, ZETA)
    lasting = fan_out - torch.bincount(pool.weight.cols[weak].long(), minlength=x.shape[1])
    ascending = torch.argsort(fan_out, stable=True).tolist()
    return {
        "seed": seed,
        "connections": [p.weight.connections for p in method.pools],
        "accuracy": {
            "best": max(scores),
            "last": scores[-1],
            "last ten": statistics.mean(scores[-10:]),
        },
        "found": sorted(ascending[-20:]),
        "fan_out": fan_out.tolist(),
        "fan_out without the weakest": lasting.tolist(),
        "least connected first": removal_curve(model, test_x, test_y, ascending),
        "most connected first": removal_curve(model, test_x, test_y, ascending[::-1]),
        "seconds": round(seconds, 1),
    }


def picture(runs: list[dict[str, Any]], name: str) -> str:
    """The two curves of every run, as SVG."""
    width, height, left, top, right, bottom = 720, 400, 56, 40, 16, 48
    features = len(runs[0]["fan_out"])
    low = 45.0

    def at(i: float, percent: float) -> str:
        x = left + (width - left - right) * i / features
        y = top + (height - top - bottom) * (100 - percent) / (100 - low)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="14">Madelon, {name}: test accuracy while inputs are '
        "set to 0</text>",
    ]
    for percent in range(50, 101, 10):
        x, y = at(0, percent).split(",")
        end = at(features, percent).split(",")[0]
        parts.append(f'<line x1="{x}" y1="{y}" x2="{end}" y2="{y}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{percent} %</text>'
        )
    for i in range(0, features + 1, 100):
        x, y = at(i, low).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 16:.1f}" text-anchor="middle">{i}</text>')
    axis = (left + width - right) / 2
    parts.append(
        f'<text x="{axis}" y="{height - 10}" text-anchor="middle">inputs removed of '
        f"{features}</text>"
    )
    kinds = (("least connected first", "#1f6fb2"), ("most connected first", "#c8452d"))
    for row, (kind, color) in enumerate(kinds):
        for each in runs:
            points = " ".join(at(i, 100 * score) for i, score in enumerate(each[kind]))
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{color}" stroke-opacity="0.6"/>'
            )
        y = top + 16 + 18 * row
        line = f'x1="{left + 12}" y1="{y - 4}" x2="{left + 36}" y2="{y - 4}"'
        parts.append(f'<line {line} stroke="{color}" stroke-width="2"/>')
        parts.append(
            f'<text x="{left + 42}" y="{y}">{kind}, a line for each of {len(runs)} seeds</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--method", default="codacorset")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(options.file)
    runs = []
    for seed in range(options.seeds):
        one = run(options.method, data, seed, options.epochs)
        runs.append(one)
        hits = len(set(one["found"]) & set(INFORMATIVE))
        counts = sorted(one["fan_out"], reverse=True)
        print(
            f"seed {seed}: {hits} of the 20 most connected inputs are informative, connections "
            f"{counts[0]} to "
            f"{counts[19]} against {counts[20]} of the next; accuracy "
            f"{one['accuracy']['last']:.1%}, with these 20 "
            f"alone {one['least connected first'][-21]:.1%}; {one['seconds']:.0f} s",
            flush=True,
        )
    if options.out:
        report = {
            "method": options.method,
            "epochs": options.epochs,
            "informative": INFORMATIVE,
            "runs": runs,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps(report, separators=(",", ":")).replace('{"seed"', '\n{"seed"') + "\n"
        )
    if options.picture:
        options.picture.write_text(picture(runs, options.method))


if __name__ == "__main__":
    main()

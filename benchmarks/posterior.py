"""Averaging the networks that DEEP R samples, against a single one: accuracy, likelihood,
calibration.

    python benchmarks/posterior.py --data-dir DIR [--data fashion-mnist] [--seeds 3] [--out
    docs/results/posterior.json]
        [--picture docs/results/posterior.svg]

784-300-100-10 without biases at the budget of DEEP R's authors (1 / 3 / 30 %, 3552 connections),
batch 10, plain SGD. The rate falls from 0.5 by 0.8 an epoch for 5 epochs, the burn-in, and stays
for 5 more, in which a network is kept every 500 steps: 60 samples. All 60,000 training samples; the
test set is looked at once, at the end: by the last network alone, by every sample alone, and by the
average of all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rewire
from rewire import posterior
from rewire.app import data
from rewire.app.data import Dataset
from rewire.app.train.batches import Batches
from rewire.nn import SparseLinear

LAYERS = [(784, 300, 2352), (300, 100, 900), (100, 10, 300)]
BATCH, RATE, DECAY, BURN_IN, SAMPLING, EVERY = 10, 0.5, 0.8, 5, 5, 500


def build(seed: int) -> nn.Sequential:
    """The network, its topology and values drawn by ``seed``."""
    generator, layers = torch.Generator().manual_seed(seed), list[nn.Module]()
    for inputs, outputs, connections in LAYERS:
        layer = SparseLinear(
            inputs, outputs, bias=False, connections=connections, generator=generator, init="dense"
        )
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def run(dataset: Dataset, seed: int) -> dict[str, Any]:
    """Train, collect, and score; what the JSON says of one seed."""
    begin = time.perf_counter()
    model = build(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    method = rewire.methods.DeepR(model, optimizer, l1=1e-5, noise=1e-5, seed=seed)
    batches = Batches(dataset.train_x, dataset.train_y, BATCH, seed)
    samples = posterior.Posterior(model, burn_in=BURN_IN * len(batches), every=EVERY)
    for epoch in range(BURN_IN + SAMPLING):
        optimizer.param_groups[0]["lr"] = RATE * DECAY ** min(epoch, BURN_IN)
        for x, y in batches.epoch(epoch):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.step()
            samples.update()
        method.end_epoch(last=epoch == BURN_IN + SAMPLING - 1)
    x, y = dataset.test_x, dataset.test_y
    model.eval()
    with torch.no_grad():
        single = torch.softmax(model(x), 1)
        each = [torch.softmax(network(x), 1) for network in samples.networks()]
    prediction = samples.predict(x)
    running, so_far = [], torch.zeros_like(each[0])
    for n, one in enumerate(each, start=1):
        so_far += one
        running.append(posterior.negative_log_likelihood(so_far / n, y))
    alone = [posterior.scores(one, y) for one in each]
    wrong = prediction.mean.argmax(1) != y
    return {
        "seed": seed,
        "seconds": time.perf_counter() - begin,
        "samples": len(samples),
        "connections": sum(w.connections for _, w in rewire.sparse_weights(model)),
        "connections_in_any_sample": sum(
            samples.inclusion(name).rows.numel() for name, _ in rewire.sparse_weights(model)
        ),
        "single": posterior.scores(single, y),
        "samples_alone_mean": {key: statistics.mean(s[key] for s in alone) for key in alone[0]},
        "average": posterior.scores(prediction.mean, y),
        "mutual_information": {
            "right": float(prediction.mutual_information[~wrong].mean()),
            "wrong": float(prediction.mutual_information[wrong].mean()),
        },
        "nll_by_samples": running,
        "reliability": {
            name: [part.tolist() for part in posterior.reliability(p, y, 10)]
            for name, p in (("single", single), ("average", prediction.mean))
        },
        "connections_by_input": expected_fan_out(samples).tolist(),
    }


def expected_fan_out(samples: posterior.Posterior) -> Tensor:
    """Connections of each input, averaged over the samples."""
    found = samples.inclusion("0.weight")
    return torch.zeros(LAYERS[0][0], dtype=torch.float64).index_add(
        0, found.cols, found.probability
    )


def picture(result: dict[str, Any]) -> str:
    """Left: accuracy against confidence, single and average. Right: connections of each pixel."""
    size, gap, top = 300, 90, 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * size + 2 * gap + 60} '
        f'{size + top + 56}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{2 * size + 2 * gap + 60}" height="{size + top + 56}" fill="white"/>',
    ]

    def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> None:
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{words}</text>')

    def place(confidence: float, accuracy: float) -> tuple[float, float]:
        return gap + confidence * size, top + (1 - accuracy) * size

    parts.append(
        f'<rect x="{gap}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#888"/>'
    )
    parts.append(
        '<path d="M{:.1f} {:.1f}L{:.1f} {:.1f}" stroke="#bbb" stroke-dasharray="4 4"/>'.format(
            *place(0, 0), *place(1, 1)
        )
    )
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place(tick, 0)
        text(x, y + 18, f"{tick:g}")
        x, y = place(0, tick)
        text(x - 8, y + 4, f"{tick:g}", "end")
    for line, (name, colour) in enumerate((("single", "#e0762f"), ("average", "#2f7fc1"))):
        confidence, accuracy, number = result["reliability"][name]
        points = [
            place(c, a) for c, a, n in zip(confidence, accuracy, number, strict=True) if n >= 20
        ]
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
            + " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            + '"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
        label = {"single": "last network", "average": f"average of {result['samples']}"}[name]
        text(
            gap + 12,
            top + 22 + 20 * line,
            f"{label}: ECE {result[name]['ece']:.3f}",
            "start",
            f'fill="{colour}"',
        )
    text(gap + size / 2, top - 16, "Calibration on the test set", more='font-size="15"')
    text(gap + size / 2, top + size + 42, "confidence")
    text(26, top + size / 2, "accuracy", more=f'transform="rotate(-90 26 {top + size / 2})"')
    left, cell = 2 * gap + size - 20, size / 28
    most = max(result["connections_by_input"])
    for i, connections in enumerate(result["connections_by_input"]):
        share = connections / most
        x, y = left + i % 28 * cell, top + i // 28 * cell
        shade = ",".join(str(round(255 + share * (dark - 255))) for dark in (16, 60, 120))
        parts.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{cell:.2f}" height="{cell:.2f}" '
            f'fill="rgb({shade})"/>'
        )
    parts.append(
        f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#888"/>'
    )
    text(left + size / 2, top - 16, "Connections of each pixel, averaged", more='font-size="15"')
    text(left + size / 2, top + size + 42, f"white: 0; darkest: {most:.1f}")
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--data", default="fashion-mnist", choices=["mnist", "fashion-mnist"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = data.load(options.data, data_dir=options.data_dir)
    runs = []
    print("| seed | | accuracy | NLL | ECE | Brier |")
    print("| --- | --- | --- | --- | --- | --- |")
    for seed in range(options.seeds):
        runs.append(run(dataset, seed))
        for name in ("single", "samples_alone_mean", "average"):
            s = runs[-1][name]
            rest = " | ".join(f"{s[key]:.4f}" for key in ("nll", "ece", "brier"))
            print(f"| {seed} | {name} | {100 * s['accuracy']:.2f} % | {rest} |", flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(
                json.dumps({"data": options.data, "results": runs}, indent=1) + "\n"
            )
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.write_text(picture(runs[0]))


if __name__ == "__main__":
    main()

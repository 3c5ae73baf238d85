"""MNIST at 1.0 % of the connections of LeNet-300-100: DEEP R trained for long, over several seeds.

    python benchmarks/mnist_one_percent.py --data-dir DIR [--seeds 5] [--jobs 2] [--only NAME]
    [--validate]
        [--out docs/results/mnist_one_percent.json]

784-300-100-10 without biases, 2662 of 266,200 connections, plain SGD whose rate falls along a
cosine, redrawn signs. Two settings: on the images as they are, and with each image shifted by up to
one pixel each way, anew in every epoch. Everything was chosen on 10,000 of the training samples
(``--validate`` scores a setting there, trained on the other 50,000); without it all 60,000 are
trained on and the test set is looked at once per run, at its end. Each run is a process of its own.
Prints a Markdown table and writes every run's result as JSON, as soon as there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rewire
from rewire.app import data
from rewire.app.train.batches import Batches, make_generator, split
from rewire.nn import SparseLinear

CONNECTIONS = (1500, 800, 362)  # 2662 together
PAPER = "96.3 %"
SETTINGS: dict[str, dict[str, Any]] = {
    "DEEP R, shifted images": {
        "epochs": 120,
        "batch": 40,
        "lr": 1.4,
        "l1": 2e-5,
        "noise": 6e-6,
        "shift": 1,
    },
    "DEEP R": {"epochs": 60, "batch": 20, "lr": 0.7, "l1": 3e-5, "noise": 1e-5, "shift": 0},
}


def shifted(x: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Each 28 x 28 image moved by up to ``pixels`` each way, zeros coming in: (n, 784)."""
    if not pixels:
        return x
    padded = nn.functional.pad(x.view(-1, 28, 28), (pixels,) * 4)
    down, right = torch.randint(0, 2 * pixels + 1, (2, len(x), 1, 1), generator=generator)
    at = torch.arange(28)
    return padded[torch.arange(len(x))[:, None, None], at[:, None] + down, at + right].view(-1, 784)


def train(setting: dict[str, Any], seed: int, data_dir: Path, validate: bool) -> dict[str, Any]:
    """One run; what the JSON says of it."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    dataset = data.load("mnist", data_dir=data_dir)
    x, y = dataset.train_x, dataset.train_y
    score_x, score_y = dataset.test_x, dataset.test_y
    if validate:  # the same 10,000 for every seed
        (x, y), (score_x, score_y) = split(x, y, 1 / 6, 0)
    generator, layers = make_generator(seed, "model"), list[nn.Module]()
    for (inputs, outputs), connections in zip(
        ((784, 300), (300, 100), (100, 10)), CONNECTIONS, strict=True
    ):
        layer = SparseLinear(
            inputs, outputs, bias=False, connections=connections, generator=generator, init="dense"
        )
        layers += [layer, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=setting["lr"])
    method = rewire.methods.DeepR(
        model, optimizer, l1=setting["l1"], noise=setting["noise"], signs="redrawn", seed=seed
    )
    epochs, steps = setting["epochs"], math.ceil(len(y) / setting["batch"])
    for epoch in range(epochs):
        batches = Batches(
            shifted(x, setting["shift"], make_generator(seed, "shift", epoch)),
            y,
            setting["batch"],
            seed,
        )
        for step, (inputs, labels) in enumerate(batches.epoch(epoch), start=epoch * steps):
            if step % 100 == 0:  # 1e-6: a rate of 0 would be no step at all
                share = (1 + math.cos(math.pi * step / (epochs * steps))) / 2
                optimizer.param_groups[0]["lr"] = max(setting["lr"] * share, 1e-6)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.step()
        method.end_epoch(last=epoch == epochs - 1)
    method.finalize()
    with torch.no_grad():
        accuracy = float((model(score_x).argmax(1) == score_y).double().mean())
    weights = dict(rewire.sparse_weights(model))
    return {
        "seed": seed,
        "validation_accuracy" if validate else "test_accuracy": accuracy,
        "connections": {name: weight.connections for name, weight in weights.items()},
        "neurons_with_inputs": {
            name: int((weight.fan_in() > 0).sum()) for name, weight in weights.items()
        },
        "rewirings": sum(method.stats()["dropped"].values()),
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument(
        "--only", choices=list(SETTINGS), help="one setting; the others' results in --out stay"
    )
    parser.add_argument(
        "--validate", action="store_true", help="score held-out training samples, not the test set"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"results": {}}
    if options.out and options.out.exists():
        report = json.loads(options.out.read_text())
    report |= {"connections": CONNECTIONS, "settings": SETTINGS, "machine": platform.machine()}
    print("| setting | accuracy, mean | each seed | seconds, median |")
    print("| --- | --- | --- | --- |")
    for name, setting in SETTINGS.items():
        if options.only not in (None, name):
            continue
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            waiting = [
                pool.submit(train, setting, s, options.data_dir, options.validate)
                for s in range(options.seeds)
            ]
            runs = []
            for future in as_completed(waiting):
                runs.append(future.result())
                runs.sort(key=lambda run: run["seed"])
                report["results"][name] = runs
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(report, indent=1) + "\n")
        key = "validation_accuracy" if options.validate else "test_accuracy"
        accuracy = [100 * run[key] for run in runs]
        print(
            f"| {name} | {statistics.mean(accuracy):.2f} % | "
            f"{', '.join(f'{a:.2f}' for a in accuracy)} | "
            f"{statistics.median(run['seconds'] for run in runs):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

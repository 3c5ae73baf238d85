"""HALO, SWS and L1 against magnitude at one cut, and sparse ternary against binary and ternary, on
MNIST.

    python benchmarks/halo_ternary.py --data-dir DIR [--seeds 3] [--epochs 6] [--out
    docs/results/halo_ternary.json]

784-300-100-10 with biases and ReLU, batch 100, SGD of rate 0.1 falling to 0 along a line, momentum
0.9, one thread. All 60,000 images train; the test set is scored at the end of a run. A run of the
first kind is trained once and cut, without fine-tuning, at several densities of all weights
together; each cut is scored as the sparse layers it leaves. A run of the second kind ends in sparse
layers of one magnitude, packed by `rewire.export.pack_ternary`. How the settings were chosen is
said in docs/halo_ternary.md. Writes every run as JSON, after each of them; runs that the file has
already are not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rewire
from rewire import methods
from rewire.app import data
from rewire.export import pack_ternary
from rewire.methods.dense_start.dense import largest
from rewire.nn import sparse_weights

DENSITIES = (0.05, 0.02, 0.01)
RATE, MOMENTUM, BATCH = 0.1, 0.9, 100
PENALTIES: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "L1": {"variant": "l1", "xi": 2e-4},
    "SWS": {"variant": "sws", "xi": 1e-4, "psi": 0.4, "lambda_lr": 1.0},
    "HALO": {"xi": 4e-5, "psi": 4e-5, "lambda_lr": 100.0},
}
QUANTIZED: dict[str, dict[str, Any]] = {
    "sparse ternary, 5 %": {"density": 0.05, "push": 1e-2, "l2": 1e-5, "after_epochs": 4},
    "sparse ternary, 2 %": {"density": 0.02, "push": 1e-2, "l2": 1e-5, "after_epochs": 4},
    "dense ternary": {"threshold": 0.05, "trainable": False, "after_epochs": 1000, "l2": 0.0},
    "binary": {"threshold": 0.0, "trainable": False, "after_epochs": 1000, "l2": 0.0},
}


def train(
    dataset: data.Dataset, name: str, settings: dict[str, Any], epochs: int, seed: int
) -> tuple[nn.Module, methods.Method | None, torch.optim.Optimizer]:
    """Train a dense network with the method and return both."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    method: methods.Method | None = None
    if name in QUANTIZED:
        method = methods.Ternary(model, optimizer, seed=seed, **settings)
    elif settings:
        method = methods.Halo(model, optimizer, seed=seed, **settings)
    x, y = dataset.train_x, dataset.train_y
    steps, step = epochs * len(y) // BATCH, 0
    for epoch in range(epochs):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for batch in order.split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / steps)
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            (loss if method is None else loss + method.penalty()).backward()
            optimizer.step()
            if method is not None:
                method.step()
            step += 1
        if method is not None:
            method.end_epoch(last=epoch + 1 == epochs)
    return model, method, optimizer


@torch.no_grad()
def accuracy(model: nn.Module, dataset: data.Dataset) -> float:
    """On the test set."""
    return float((model(dataset.test_x).argmax(1) == dataset.test_y).double().mean())


def run(dataset: data.Dataset, name: str, epochs: int, seed: int) -> dict[str, Any]:
    """One run: what it was given and what came out."""
    began = time.perf_counter()
    settings = PENALTIES[name] if name in PENALTIES else QUANTIZED[name]
    model, method, _ = train(dataset, name, settings, epochs, seed)
    result: dict[str, Any] = {
        "seed": seed,
        "settings": settings,
        "seconds": time.perf_counter() - began,
    }
    result["accuracy_before"] = accuracy(model, dataset)
    if isinstance(method, methods.Ternary):
        result["stage"] = method.stage
        model = method.finalize()
        packed = pack_ternary(model)[1]
        result |= {
            "accuracy": accuracy(model, dataset),
            "connections": rewire.summary(model).connections,
            "density": rewire.summary(model).density,
            "bytes": packed.bytes,
            "binary_bytes": packed.binary_bytes,
            "ternary_bytes": packed.ternary_bytes,
            "file_bytes": packed.file_bytes,
            "codes": {
                w.name: {"code": w.code, "bits": w.bits, "entries": w.entries}
                for w in packed.weights
            },
        }
        return result
    cuts = {}
    for density in DENSITIES:
        cut = copy.deepcopy(model)
        weights = {n: p for n, p in cut.named_parameters() if p.dim() == 2}
        cut = rewire.to_sparse(cut, largest(weights, density))
        counts = {n: w.connections for n, w in sparse_weights(cut)}
        cuts[f"{density:g}"] = {"accuracy": accuracy(cut, dataset), "connections": counts}
    return result | {"cuts": cuts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = data.load("mnist", data_dir=options.data_dir)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in [*PENALTIES, *QUANTIZED]}
    if options.out and options.out.exists():
        results |= json.loads(options.out.read_text())["results"]
    report = {"epochs": options.epochs, "rate": RATE, "momentum": MOMENTUM, "batch": BATCH}
    report["machine"] = platform.processor() or platform.machine()
    for seed in range(options.seeds):
        for name, runs in results.items():
            if any(r["seed"] == seed for r in runs):
                continue
            runs.append(run(dataset, name, options.epochs, seed))
            shown = {k: v for k, v in runs[-1].items() if k not in ("settings", "codes")}
            print(name, json.dumps(shown), flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(report | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

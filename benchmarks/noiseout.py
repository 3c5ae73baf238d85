"""NoiseOut on MNIST: its paper's two networks with all four kinds of noise outputs, over several seeds.

    python benchmarks/noiseout.py --data-dir DIR [--seeds 3] [--network lenet-300-100] [--out docs/results/noiseout.json]

lenet-300-100: 784-300-100-10, all hidden neurons. lenet-5: 32 convolutions 5x5, pool, 32 of 3x3, pool, a dense layer of 512,
10 outputs; neurons of the dense layer, as in the paper. 50,000 images train and 10,000 validate: a merge stands if the
validation error is at most the network's bar less a margin that is set beforehand. The test set is looked at once per run, at
its end. Adam; a check every 100 steps. Writes every run's result as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewire import data
from rewire.methods import NoiseOut

NOISES = ("none", "gaussian", "constant", "binomial")
#: Neurons left and percent of parameters removed, as the paper reports them; the error level in percent.
PAPER: dict[str, dict[str, tuple[str, float]]] = {
    "lenet-300-100": {
        "none": ("23/14", 93.04), "gaussian": ("20/9", 94.00), "constant": ("20/7", 94.02), "binomial": ("19/6", 94.33)
    },
    "lenet-5": {"none": ("313", 38.21), "gaussian": ("3", 97.75), "constant": ("33", 91.99), "binomial": ("26", 93.34)},
}  # fmt: skip
VALIDATION = 10_000


@dataclass(frozen=True)
class Plan:
    """How a network is trained: epochs before the first merge and after, rates at the start and the end of each part."""

    level: float  # test error, percent, at which the paper prunes
    bar: float  # validation error, percent, that a network must meet
    before: int
    after: int
    lr: float = 1e-3
    lr_end: float = 1e-4
    batch: int = 100
    every: int = 100
    strength: float = 0.1
    criterion: str = "correlation"
    layers: str | None = None


PLANS = {
    "lenet-300-100": Plan(level=3.05, bar=2.8, before=8, after=60),
    "lenet-5": Plan(level=0.95, bar=0.85, before=10, after=60, layers="9"),
}


def network(name: str) -> nn.Sequential:
    """The paper's networks."""
    if name == "lenet-300-100":
        return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Identity(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of images that are classified wrongly."""
    training = model.training
    model.eval()
    wrong = sum(int((model(a).argmax(1) != b).sum()) for a, b in zip(x.split(2000), y.split(2000), strict=True))
    model.train(training)
    return 100 * wrong / len(y)


class Images:
    """MNIST on a device: training, validation and test images as rows of 784 numbers."""

    def __init__(self, folder: str, seed: int, device: str) -> None:
        images = data.load("mnist", data_dir=Path(folder))
        order = torch.randperm(len(images.train_y), generator=torch.Generator().manual_seed(seed))
        kept, held = order[:-VALIDATION], order[-VALIDATION:]
        self.train = images.train_x[kept].to(device), images.train_y[kept].to(device)
        self.held = images.train_x[held].to(device), images.train_y[held].to(device)
        self.test = images.test_x.to(device), images.test_y.to(device)


def run(name: str, noise: str, seed: int, plan: Plan, images: Images, device: str, verbose: bool) -> dict[str, Any]:
    """One network trained and pruned; what became of it."""
    torch.manual_seed(seed)
    model = network(name).to(device)
    whole = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.lr)
    x, y = images.train
    method = NoiseOut(
        model, optimizer, data=x.split(1000), noise=noise, strength=plan.strength, threshold=plan.bar, mode="min",
        layers=plan.layers, criterion=plan.criterion, every=plan.every, seed=seed,
        warmup=plan.before * len(x) // plan.batch // plan.every, evaluate=lambda m: error(m, *images.held),
    )  # fmt: skip
    start, generator, base = time.perf_counter(), torch.Generator().manual_seed(seed), 0.0
    model.train()
    for epoch in range(plan.before + plan.after):
        part = epoch / plan.before if epoch < plan.before else (epoch - plan.before) / plan.after
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * (plan.lr_end / plan.lr) ** part
        for index in torch.randperm(len(y), generator=generator).to(device).split(plan.batch):
            loss = nn.functional.cross_entropy(model(x[index]), y[index]) + method.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.step()
        method.end_epoch()
        if epoch == plan.before - 1:
            base = error(model, *images.held)
        if verbose:
            stats = method.stats()
            print(epoch, stats["units"], stats["parameters_met"], f"{time.perf_counter() - start:.0f}s", flush=True)
    met = method.stats()["parameters_met"] is not None
    model = method.finalize()
    left = sum(p.numel() for p in model.parameters())
    return {
        "seed": seed,
        "met": met,
        "validation_error_before": base,
        "validation_error": error(model, *images.held),
        "test_error": error(model, *images.test),
        "neurons": [m.out_features for m in model if isinstance(m, nn.Linear)][:-1],
        "parameters": left,
        "removed": 100 * (1 - left / whole),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--network", choices=list(PLANS), action="append")
    parser.add_argument("--noise", choices=NOISES, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the plan")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__, "networks": {}}
    print("| network | noise | neurons, each seed | removed, mean | test error, mean | paper | seconds |", flush=True)
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.network or PLANS:
        changes = dict(pair.split("=", 1) for pair in options.set)
        known = asdict(PLANS[name])
        plan = Plan(
            **{
                k: type(known[k] or "")(changes.get(k, v)) if v is not None else changes.get(k)
                for k, v in known.items()
            }
        )
        results: dict[str, list[dict[str, Any]]] = {}
        for noise in options.noise or NOISES:
            runs = []
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                images = Images(options.data_dir, seed, options.device)
                runs.append(run(name, noise, seed, plan, images, options.device, options.verbose))
            results[noise] = runs
            each = ", ".join("/".join(map(str, r["neurons"])) for r in runs)
            removed, wrong = (sum(r[k] for r in runs) / len(runs) for k in ("removed", "test_error"))
            neurons, paper = PAPER[name][noise]
            seconds = sum(r["seconds"] for r in runs) / len(runs)
            print(
                f"| {name} | {noise} | {each} | {removed:.2f} % | {wrong:.2f} % | {neurons}, {paper:.2f} % | "
                f"{seconds:.0f} |",
                flush=True,
            )
        report["networks"][name] = {"plan": asdict(plan), "results": results}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

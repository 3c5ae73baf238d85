"""NoiseOut on MNIST: its paper's two networks with all four kinds of noise outputs, over several seeds.

    python benchmarks/noiseout.py --data-dir DIR [--seeds 3] [--network NAME] [--cache DIR] --out FILE.json

lenet-300-100: 784-300-100-10, all hidden neurons, trained with noise outputs from the start on images shifted by up to
one pixel. lenet-5: 32 convolutions 5x5, pool, 32 of 3x3, pool, a dense layer of 512, 10 outputs; neurons of the dense
layer, as in the paper: the network is trained once per seed; then its convolutions stand still while the rest trains
with noise outputs, and at last all train together, in bfloat16 on images shifted by up to two pixels.

50,000 images train and 10,000 validate: a merge stands if the validation error is at most the paper's error level, for
lenet-5 0.1 percent less. The test set is looked at once per run, at its end. Runs that FILE.json has already are not
made again; it is written after every run, and a Markdown table of it is printed at the end.
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
#: Neurons left and percent of parameters removed, as the paper reports them.
PAPER: dict[str, dict[str, tuple[str, float]]] = {
    "lenet-300-100": {
        "none": ("23/14", 93.04), "gaussian": ("20/9", 94.00), "constant": ("20/7", 94.02), "binomial": ("19/6", 94.33)
    },
    "lenet-5": {"none": ("313", 38.21), "gaussian": ("3", 97.75), "constant": ("33", 91.99), "binomial": ("26", 93.34)},
}  # fmt: skip
VALIDATION = 10_000


@dataclass(frozen=True)
class Plan:
    """How a network is pruned: the validation error in percent that must be met (the paper's error level), epochs
    before the first merge and after, epochs of the whole network if the first ones were of a part, learning rate in the
    first part and where it falls to in the second."""

    bar: float
    before: int
    after: int
    whole: int
    shift: int
    lr: float = 4e-3
    lr_end: float = 1e-4
    batch: int = 200
    every: int = 125
    strength: float = 0.1
    criterion: str = "damage"
    pace: float = 0.05


PLANS = {
    "lenet-300-100": Plan(bar=3.05, before=3, after=60, whole=0, shift=1),
    "lenet-5": Plan(bar=0.85, before=0, after=12, whole=14, shift=0, lr=2e-3),
}
BASE_EPOCHS = 7


def lenet_300_100() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def lenet_5() -> nn.Sequential:
    """The convolutions, and the dense layers behind them."""
    features = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    )  # fmt: skip
    return nn.Sequential(features, nn.Sequential(nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 10)))


def shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """The batch moved by up to so many pixels along each axis (MNIST's borders are empty)."""
    if not most:
        return x
    by = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
    return x.view(-1, 28, 28).roll(by, (1, 2)).flatten(1)


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of images that are classified wrongly."""
    training = model.training
    model.eval()
    wrong = sum(int((model(a).argmax(1) != b).sum()) for a, b in zip(x.split(2000), y.split(2000), strict=True))
    model.train(training)
    return 100 * wrong / len(y)


Split = tuple[Tensor, Tensor]


def images(folder: str, seed: int) -> tuple[Split, Split, Split]:
    """MNIST's training, validation and test images as rows of 784 numbers."""
    mnist = data.load("mnist", data_dir=Path(folder))
    order = torch.randperm(len(mnist.train_y), generator=torch.Generator().manual_seed(seed))
    kept, held = order[:-VALIDATION], order[-VALIDATION:]
    train, held_out = ((mnist.train_x[i], mnist.train_y[i]) for i in (kept, held))
    return train, held_out, (mnist.test_x, mnist.test_y)


def base(seed: int, train: Split, cache: Path | None) -> nn.Sequential:
    """lenet-5, trained in bfloat16 on images shifted by up to two pixels (the last epoch: not shifted)."""
    torch.manual_seed(seed)
    model = lenet_5().to(memory_format=torch.channels_last)
    file = None if cache is None else cache / f"lenet-5-{seed}.pt"
    if file is not None and file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    x, y = train
    steps = len(x) // 100 * BASE_EPOCHS
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(BASE_EPOCHS):
        for index in torch.randperm(len(y), generator=generator).split(100):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(shifted(x[index], 2 if epoch < BASE_EPOCHS - 1 else 0, generator))
            optimizer.zero_grad()
            nn.functional.cross_entropy(out.float(), y[index]).backward()
            optimizer.step()
            schedule.step()
    if file is not None:
        torch.save(model.state_dict(), file)
    return model


@torch.no_grad()
def through(model: nn.Module, x: Tensor) -> Tensor:
    """What the convolutions make of the images."""
    return torch.cat([model(part.contiguous()) for part in x.split(1000)])


def prune(
    model: nn.Module,
    layers: str | None,
    noise: str,
    plan: Plan,
    seed: int,
    train: Split,
    held: Split,
    verbose: bool,
    *,
    before: int,
    after: int,
    lr: float,
    shift: int,
    half: bool,
) -> tuple[nn.Module, float, bool]:
    """Train with NoiseOut: the network, its validation error before the first merge, whether a network met the bar."""
    x, y = train
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def validation(m: nn.Module) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return error(m, *held)

    method = NoiseOut(
        model, optimizer, data=x.split(1000), noise=noise, strength=plan.strength, threshold=plan.bar, mode="min",
        criterion=plan.criterion, every=plan.every, seed=seed, pace=plan.pace, layers=layers,
        warmup=before * len(x) // plan.batch // plan.every, evaluate=validation,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    base_error = validation(model)
    start = time.perf_counter()
    for epoch in range(before + after):
        for group in optimizer.param_groups:
            group["lr"] = lr * (plan.lr_end / lr) ** max(0.0, (epoch - before) / after)
        for index in torch.randperm(len(y), generator=generator).split(plan.batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = model(shifted(x[index], shift, generator))
            loss = nn.functional.cross_entropy(out.float(), y[index]) + method.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.step()
        method.end_epoch()
        if epoch == before - 1:
            base_error = validation(model)
        if verbose:
            stats = method.stats()
            print(noise, seed, epoch, stats["units"], stats["score"], f"{time.perf_counter() - start:.0f}s", flush=True)
    met = method.stats()["parameters_met"] is not None
    return method.finalize(), base_error, met


def run(name: str, noise: str, seed: int, plan: Plan, folder: str, cache: Path | None, verbose: bool) -> dict[str, Any]:
    """One network trained and pruned; what became of it."""
    train, held, test = images(folder, seed)
    start = time.perf_counter()
    torch.manual_seed(seed)
    if name == "lenet-5":
        model: nn.Sequential = base(seed, train, cache)
        before = sum(p.numel() for p in model.parameters())
        seen = [(through(model[0], x), y) for x, y in (train, held)]
        _, base_error, met = prune(
            model[1], None, noise, plan, seed, seen[0], seen[1], verbose,
            before=plan.before, after=plan.after, lr=plan.lr, shift=0, half=False,
        )  # fmt: skip
        del seen
        _, _, again = prune(
            model, "1.0", noise, plan, seed, train, held, verbose,
            before=0, after=plan.whole, lr=plan.lr / 2, shift=2, half=True,
        )  # fmt: skip
        met = met and again
    else:
        model = lenet_300_100()
        before = sum(p.numel() for p in model.parameters())
        _, base_error, met = prune(
            model, None, noise, plan, seed, train, held, verbose,
            before=plan.before, after=plan.after, lr=plan.lr, shift=plan.shift, half=False,
        )  # fmt: skip
    left = sum(p.numel() for p in model.parameters())
    return {
        "seed": seed,
        "met": met,
        "validation_error_before": base_error,
        "validation_error": error(model, *held),
        "test_error": error(model, *test),
        "neurons": [m.out_features for m in model.modules() if isinstance(m, nn.Linear)][:-1],
        "parameters": left,
        "removed": 100 * (1 - left / before),
        "seconds": time.perf_counter() - start,
    }


def table(report: dict[str, Any]) -> str:
    """What docs/noiseout.md shows, from the results."""
    lines = [
        "| network | noise | neurons, each seed | parameters removed | test error | paper: neurons, removed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in report["networks"].items():
        for noise, runs in entry["results"].items():
            each = ", ".join("/".join(map(str, r["neurons"])) for r in runs)
            removed, wrong = (sum(r[k] for r in runs) / len(runs) for k in ("removed", "test_error"))
            neurons, paper = PAPER[name][noise]
            lines.append(f"| {name} | {noise} | {each} | {removed:.2f} % | {wrong:.2f} % | {neurons}, {paper:.2f} % |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--network", choices=list(PLANS), action="append")
    parser.add_argument("--noise", choices=NOISES, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="a folder for lenet-5's trained convolutions")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the plan")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__, "networks": {}}
    if options.out.exists():
        report = json.loads(options.out.read_text())
    for seed in range(options.seeds):
        for name in options.network or PLANS:
            changes = dict(pair.split("=", 1) for pair in options.set)
            plan = Plan(**{k: type(v)(changes.get(k, v)) for k, v in asdict(PLANS[name]).items()})
            entry = report["networks"].setdefault(name, {"plan": asdict(plan), "results": {}})
            if entry["plan"] != asdict(plan):
                parser.error(f"{options.out} has {name} with another plan: {entry['plan']}")
            for noise in options.noise or NOISES:
                runs = entry["results"].setdefault(noise, [])
                if any(r["seed"] == seed for r in runs):
                    continue
                runs.append(run(name, noise, seed, plan, options.data_dir, options.cache, options.verbose))
                print(name, noise, json.dumps(runs[-1]), flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()

"""NoiseOut on MNIST: its paper's two networks with all four kinds of noise outputs, over several
seeds.

    python benchmarks/noiseout.py --data-dir DIR [--network NAME] [--noise KIND] [--first-seed 3]
    [--seeds 3]
        [--cache DIR] --out FILE.json

lenet-300-100: 784-300-100-10, all hidden neurons, trained with noise outputs from the start on
images shifted by up to one pixel. lenet-5: 32 convolutions 5x5, pool, 32 of 3x3, pool, a dense
layer of 512, 10 outputs; neurons of the dense layer, as in the paper. The network is trained once
per seed; then its first convolution stands still, what it makes of the images is kept, and the rest
trains with noise outputs in bfloat16: with dropout, and at last on shifted images.

The learning rate falls with progress instead of the clock: a check that merges turns it up again,
and a stage ends when the rate has reached its lowest without a merge. Every check sees the mean of
the last weights (`Average`). 50,000 images train and 10,000 validate: a merge stands if the
validation error is at most the paper's error level. The test set is looked at once per run, at its
end, and not at all with --trial, for choosing a plan. Runs that FILE.json has already are not made
again; it is written after every run, and a Markdown table of it is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from noiseout_training import (
    Anneal,
    Average,
    Shifts,
    Split,
    Stage,
    base,
    error,
    lenet_300_100,
    outputs,
    seen,
    through,
)
from torch import nn

from rewire.app import data
from rewire.methods import NoiseOut

NOISES = ("none", "gaussian", "constant", "binomial")
#: Neurons left and percent of parameters removed, as the paper reports them.
PAPER: dict[str, dict[str, tuple[str, float]]] = {
    "lenet-300-100": {
        "none": ("23/14", 93.04),
        "gaussian": ("20/9", 94.00),
        "constant": ("20/7", 94.02),
        "binomial": ("19/6", 94.33),
    },
    "lenet-5": {
        "none": ("313", 38.21),
        "gaussian": ("3", 97.75),
        "constant": ("33", 91.99),
        "binomial": ("26", 93.34),
    },
}
PAPER["lenet-5, channels too"] = PAPER["lenet-5"]
VALIDATION = 10_000


@dataclass(frozen=True)
class Plan:
    """The validation error in percent that a network must meet, NoiseOut's settings, and the
    stages.
    """

    bar: float
    stages: dict[str, Stage]
    strength: float = 0.1
    criterion: str = "damage"
    pace: float = 0.02
    base_epochs: int = 0
    layers: str = "*"

    def changed(self, pairs: Iterable[str]) -> Plan:
        """With NAME=VALUE for the plan's own fields and STAGE.NAME=VALUE for a stage's."""
        plan = self
        for pair in pairs:
            name, value = pair.split("=", 1)
            stage, _, field = name.rpartition(".")
            if stage:
                old = plan.stages[stage]
                new = replace(old, **{field: type(getattr(old, field))(value)})
                plan = replace(plan, stages={**plan.stages, stage: new})
            else:
                plan = replace(plan, **{field: type(getattr(plan, field))(value)})
        return plan


PLANS = {
    "lenet-300-100": Plan(
        bar=3.05,
        stages={
            "all": Stage(cycle=100, back=0.05, most=400, lr=4e-3, before=3, shift=1),
            "trim": Stage(cycle=20, back=0.0, most=20, lr=1e-3, shift=1, overshoot="undo"),
        },
    ),
    "lenet-5": Plan(
        bar=0.95,
        pace=0.1,
        base_epochs=12,
        layers="5",
        stages={
            "still": Stage(cycle=5, back=0.4, most=16, lr=2e-3, batch=100, every=250, dropout=0.3),
            "moved": Stage(
                cycle=30, back=0.3, most=120, lr=2e-3, batch=100, every=250, dropout=0.1, shift=1
            ),
        },
    ),
}
PLANS["lenet-5, channels too"] = replace(PLANS["lenet-5"], layers="0,5", pace=0.03).changed(
    ["moved.cycle=25", "moved.back=0.1", "moved.overshoot=undo"]
)


def images(folder: str, seed: int) -> tuple[Split, Split, Split]:
    """MNIST's training, validation and test images as rows of 784 numbers."""
    mnist = data.load("mnist", data_dir=Path(folder))
    order = torch.randperm(len(mnist.train_y), generator=torch.Generator().manual_seed(seed))
    kept, held = order[:-VALIDATION], order[-VALIDATION:]
    train, held_out = ((mnist.train_x[i], mnist.train_y[i]) for i in (kept, held))
    return train, held_out, (mnist.test_x, mnist.test_y)


def prune(
    model: nn.Sequential,
    noise: str,
    plan: Plan,
    stage: Stage,
    seed: int,
    train: Split,
    held: Split,
    verbose: bool,
    half: bool = False,
) -> tuple[float, bool]:
    """Train with NoiseOut: the validation error before the first merge, and whether a network met
    the level.
    """
    x, y = train
    optimizer = torch.optim.Adam(model.parameters(), lr=stage.lr)

    def validation(m: nn.Sequential) -> float:
        return error(m, seen(held[0]), held[1], half)

    method = NoiseOut(
        model,
        optimizer,
        data=seen(x[:2000].float()).split(1000),
        targets=noise,
        strength=plan.strength,
        required_score=plan.bar,
        larger_is_better=False,
        criterion=plan.criterion,
        every=stage.every,
        seed=seed,
        pace=plan.pace,
        only=plan.layers.split(",") if plan.layers else None,
        warmup=stage.before * len(x) // stage.batch // stage.every,
        evaluate=validation,
        overshoot=stage.overshoot,
    )
    generator = torch.Generator().manual_seed(seed)
    shifts = Shifts(stage.shift, generator)
    average = Average(stage, model)
    # dropout's numbers do not depend on whether the network was trained or read
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = stage.dropout
    anneal = Anneal(stage, optimizer, len(y) // stage.batch)
    base_error = validation(model)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    start = time.perf_counter()
    for epoch in range(stage.before + stage.most):
        for index in torch.randperm(len(y), generator=generator).split(stage.batch):
            out = outputs(model, seen(shifts(x[index])), half)
            loss = nn.functional.cross_entropy(out, y[index]) + method.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.step()
            method.step()
            if epoch >= stage.before:
                anneal.step(method.updates)
        method.end_epoch()
        if epoch == stage.before - 1:
            base_error = validation(model)
        if verbose:
            stats, spent = method.stats(), time.perf_counter() - start
            print(
                noise,
                seed,
                epoch,
                stats["units"],
                stats["score"],
                f"{anneal.at:.2f} {spent:.0f}s",
                flush=True,
            )
        if anneal.at >= 1:
            break
    met = method.stats()["parameters_met"] is not None
    method.finalize()
    if not met:  # no check merged either
        model.load_state_dict(first)
    return base_error, met


def run(
    name: str, noise: str, seed: int, plan: Plan, options: argparse.Namespace
) -> dict[str, Any]:
    """One network trained and pruned; what became of it."""
    train, held, test = images(options.data_dir, seed)
    start = time.perf_counter()
    torch.manual_seed(seed)
    verbose: bool = options.verbose
    if name.startswith("lenet-5"):
        model = base(seed, plan.base_epochs, train, options.cache)
        before = sum(p.numel() for p in model.parameters())
        maps = [(through(model[0], x), y) for x, y in (train, held)]
        base_error = error(model, *held)
        met = False
        for stage in plan.stages.values():
            met |= prune(model[1], noise, plan, stage, seed, *maps, verbose, half=True)[1]
    else:
        model = lenet_300_100()
        before = sum(p.numel() for p in model.parameters())
        first, *rest = plan.stages.values()
        base_error, met = prune(model, noise, plan, first, seed, train, held, verbose)
        for stage in rest:
            met |= prune(model, noise, plan, stage, seed, train, held, verbose)[1]
    left = sum(p.numel() for p in model.parameters())
    return {
        "seed": seed,
        "met": met,
        "validation_error_before": base_error,
        "validation_error": error(model, *held),
        "test_error": None if options.trial else error(model, *test),
        "neurons": [m.out_features for m in model.modules() if isinstance(m, nn.Linear)][:-1],
        "channels": [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)],
        "parameters": left,
        "removed": 100 * (1 - left / before),
        "seconds": time.perf_counter() - start,
    }


def _channels(made: dict[str, Any]) -> str:
    """How many channels of the second convolution a network has, if not all."""
    left = made["channels"][1:]
    return f" + {left[0]} channels" if left and left[0] < 32 else ""


def table(report: dict[str, Any]) -> str:
    """What docs/noiseout.md shows, from the results."""
    lines = [
        "| network | noise | neurons, each seed | parameters removed | test error | paper: "
        "neurons, removed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in report["networks"].items():
        for noise, runs in entry["results"].items():
            each = ", ".join("/".join(map(str, r["neurons"])) + _channels(r) for r in runs)
            removed, wrong = (
                sum(r[k] or 0 for r in runs) / len(runs) for k in ("removed", "test_error")
            )
            neurons, paper = PAPER[name][noise]
            lines.append(
                f"| {name} | {noise} | {each} | {removed:.2f} % | {wrong:.2f} % | "
                f"{neurons}, {paper:.2f} % |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--network", choices=list(PLANS), action="append")
    parser.add_argument("--noise", choices=NOISES, action="append")
    parser.add_argument(
        "--first-seed",
        type=int,
        default=3,
        help="0 to 2 were used up by the trials of an older plan",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="a folder for lenet-5's trained convolutions")
    parser.add_argument(
        "--set", action="append", default=[], metavar="[STAGE.]NAME=VALUE", help="change the plan"
    )
    parser.add_argument("--trial", action="store_true", help="do not look at the test set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "networks": {},
    }
    if options.out.exists():
        report = json.loads(options.out.read_text())
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.network or PLANS:
            plan = PLANS[name].changed(options.set)
            entry = report["networks"].setdefault(name, {"plan": asdict(plan), "results": {}})
            if entry["plan"] != asdict(plan):
                parser.error(f"{options.out} has {name} with another plan: {entry['plan']}")
            for noise in options.noise or NOISES:
                runs = entry["results"].setdefault(noise, [])
                if any(r["seed"] == seed for r in runs):
                    continue
                runs.append(run(name, noise, seed, plan, options))
                print(name, noise, json.dumps(runs[-1]), flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()

"""Measure what every method reaches with the defaults of `rewire train`.

    python benchmarks/defaults.py --data-dir DIR [--only METHOD,...] [--data NAME,...]
        [--densities D,...] [--seeds 3] [--jobs 2] [--out docs/results/defaults.json]
        [--page docs/defaults.md] [--no-runs]

The script sets the data, the density, the seed and the number of epochs, and nothing else: 20
epochs on the digits at 1, 2, 5 and 10 % of the connections of 64-300-100-10, and 2 epochs on MNIST
and Fashion-MNIST at 2 and 10 % of 784-300-100-10. It compares the methods with `static`, fixed
random connections, from each of its three starts (``--init``): no method should be below the best
of them. Methods that do not keep a budget are listed with the density that they end with.

The script skips runs that ``--out`` holds already, so you can stop it and start it again. Delete
the runs of a method from the file when its defaults change. ``--page`` writes the tables into the
page, between its marks; with ``--no-runs`` the script trains nothing and uses what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from rewire import methods
from rewire.app import data
from rewire.app.data import Dataset
from rewire.app.train import loop
from rewire.app.train.config import make_config
from rewire.app.train.run_dir import METRICS, RunDir

#: Densities and epochs of each data set.
SETTINGS: dict[str, tuple[tuple[float, ...], int]] = {
    "digits": ((0.01, 0.02, 0.05, 0.1), 20),
    "mnist": ((0.02, 0.1), 2),
    "fashion-mnist": ((0.02, 0.1), 2),
}
STARTS = ("static, init auto", "static, init dense", "static, init sparse")
#: These find out themselves how much is left, whatever density they are given.
UNBOUND = ("differentiable", "noiseout", "soft-deep-r")
#: These have no parameter for a density at all, so one run serves all densities.
ALONE = ("differentiable", "noiseout")
#: Points by which a mean may lie below that of `static` with its best start.
TOLERANCE = 0.5
BEGIN, END = "<!-- begin of the tables -->", "<!-- end of the tables -->"


@dataclass(frozen=True)
class Job:
    """One run."""

    data: str
    density: float | None
    method: str
    seed: int

    @property
    def key(self) -> str:
        """Its name in the results."""
        return (
            f"{self.data} {'-' if self.density is None else self.density} {self.method} {self.seed}"
        )


_LOADED: dict[str, Dataset] = {}


def train(job: Job, data_dir: Path | None) -> dict[str, Any]:
    """Train as ``job`` says; return what the results file keeps of it."""
    torch.set_num_threads(1)
    if job.data not in _LOADED:
        _LOADED[job.data] = data.load(job.data, data_dir=data_dir)
    method, _, init = job.method.partition(", init ")
    options: dict[str, Any] = {
        "data": job.data,
        "method": method,
        "seed": job.seed,
        "epochs": SETTINGS[job.data][1],
    }
    if job.density is not None:
        options["density"] = (job.density,)
    if init:
        options["init"] = init
    with tempfile.TemporaryDirectory() as folder:
        place = RunDir(Path(folder) / "run")
        result = loop.run(make_config(options | {"threads": 1}), _LOADED[job.data], place)
        last = json.loads((place.path / METRICS).read_text().splitlines()[-1])
        config = place.read_config()
    return {
        "test_accuracy": result["test_accuracy"],
        "density": result["density"],
        "validation_accuracy": last["validation_accuracy"],
        "train_accuracy": last["train_accuracy"],
        "seconds": round(result["seconds"], 2),
        "optimizer": config.optimizer,
        "lr": config.lr,
        "method_options": config.method_options,
    }


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """All runs that were asked for, those of `static` first."""
    names = [*STARTS, *(name for name in methods.available() if name != "static")]
    if options.only:
        names = [name for name in names if name.split(",")[0] in options.only.split(",")]
    for dataset, (densities, _) in SETTINGS.items():
        if options.data and dataset not in options.data.split(","):
            continue
        for density in densities:
            if options.densities and density not in map(float, options.densities.split(",")):
                continue
            for name in names:
                for seed in range(options.seeds):
                    if name not in ALONE or density == densities[0]:
                        yield Job(dataset, None if name in ALONE else density, name, seed)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make the runs that are missing; return the results of all."""
    done: dict[str, Any] = {}
    if options.out.exists():
        done = json.loads(options.out.read_text())["runs"]
    missing = [] if options.no_runs else [job for job in jobs(options) if job.key not in done]
    context = get_context("spawn")
    with ProcessPoolExecutor(
        options.jobs, mp_context=context, initializer=os.nice, initargs=(options.nice,)
    ) as pool:
        waiting = {pool.submit(train, job, options.data_dir): job for job in missing}
        for future in as_completed(waiting):
            done[waiting[future].key] = made = future.result()
            print(
                f"{waiting[future].key}: {100 * made['test_accuracy']:.2f} % in "
                f"{made['seconds']:.0f} s",
                flush=True,
            )
            options.out.parent.mkdir(parents=True, exist_ok=True)
            unfinished = options.out.with_suffix(".part")
            unfinished.write_text(
                json.dumps(
                    {"torch": torch.__version__, "runs": dict(sorted(done.items()))}, indent=0
                )
            )
            unfinished.replace(options.out)
    return done


# --- the page -------------------------------------------------------------------------------------


def accuracies(runs: dict[str, Any], dataset: str, density: float | None, name: str) -> list[float]:
    """Test accuracies in percent, of the seeds there are."""
    prefix = f"{dataset} {'-' if density is None else density} {name} "
    return [100 * made["test_accuracy"] for key, made in runs.items() if key.startswith(prefix)]


def best_static(runs: dict[str, Any], dataset: str, density: float) -> float:
    """The mean of `static` from its best start; 0 where it has not been run."""
    means = [
        statistics.mean(found)
        for name in STARTS
        if (found := accuracies(runs, dataset, density, name))
    ]
    return max(means, default=0.0)


def misses(runs: dict[str, Any]) -> list[tuple[str, float, str, float]]:
    """All that are too far below `static` with its best start: data, density, method, points."""
    found = []
    for dataset, (densities, _) in SETTINGS.items():
        for density in densities:
            for name in methods.available():
                got = accuracies(runs, dataset, density, name)
                if name not in UNBOUND and got:
                    below = best_static(runs, dataset, density) - statistics.mean(got)
                    if below > TOLERANCE:
                        found.append((dataset, density, name, below))
    return found


def score(got: list[float]) -> str:
    """Mean and standard deviation; the number of seeds where it is not the usual three."""
    seeds = "" if len(got) == 3 else f" ({len(got)} seeds)" if len(got) > 1 else " (1 seed)"
    spread = f" ± {statistics.pstdev(got):.1f}" if len(got) > 1 else ""
    return f"{statistics.mean(got):.1f}{spread}{seeds}"


def tables(runs: dict[str, Any]) -> str:
    """All tables in Markdown."""
    low = {miss[:3] for miss in misses(runs)}
    parts = []
    for dataset, (densities, epochs) in SETTINGS.items():
        if not any(key.startswith(f"{dataset} ") for key in runs):
            continue
        parts += [
            f"\n### {dataset}, {epochs} epochs\n",
            "| method | " + " | ".join(f"{d:.0%}" for d in densities) + " |",
        ]
        parts.append("| --- |" + " --- |" * len(densities))
        names = [*STARTS, *(n for n in methods.available() if n != "static" and n not in UNBOUND)]
        for name in names:
            cells = []
            for density in densities:
                got = accuracies(runs, dataset, density, name)
                cell = score(got) if got else "-"
                cells.append(f"**{cell}** (below)" if (dataset, density, name) in low else cell)
            parts.append(f"| {name} | " + " | ".join(cells) + " |")
    parts += [
        "\n### Methods that find out themselves how much is left\n",
        "| data | method | given | left | accuracy |",
    ]
    parts.append("| --- | --- | --- | --- | --- |")
    for dataset, (densities, _) in SETTINGS.items():
        for name in UNBOUND:
            for asked in (None,) if name in ALONE else densities:
                got = accuracies(runs, dataset, asked, name)
                if got:
                    given = "-" if asked is None else f"{asked:.0%}"
                    prefix = f"{dataset} {'-' if asked is None else asked} {name} "
                    left = statistics.mean(
                        made["density"] for key, made in runs.items() if key.startswith(prefix)
                    )
                    parts.append(f"| {dataset} | {name} | {given} | {left:.1%} | {score(got)} |")
    return "\n".join(parts)


def write_page(page: Path, runs: dict[str, Any]) -> None:
    """Put the tables between the page's marks."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{tables(runs)}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", type=Path, help="the files of MNIST and Fashion-MNIST, as for rewire train"
    )
    parser.add_argument("--only", help="methods, with commas between them")
    parser.add_argument("--data", help="data sets, with commas between them")
    parser.add_argument("--densities", help="numbers, with commas between them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/defaults.json"))
    parser.add_argument("--page", type=Path, help="the page that the tables are written into")
    parser.add_argument("--no-runs", action="store_true", help="train nothing")
    options = parser.parse_args()
    runs = run(options)
    for dataset, density, name, below in misses(runs):
        print(
            f"{name} on {dataset} at {density:.0%}: {below:.1f} points below static with its "
            "best start"
        )
    if options.page:
        write_page(options.page, runs)


if __name__ == "__main__":
    main()

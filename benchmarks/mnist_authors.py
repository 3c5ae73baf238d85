"""DEEP R on MNIST in its authors' setting, and baselines at the same budget, over several seeds.

    python benchmarks/mnist_authors.py --data-dir DIR [--seeds 5] [--jobs 2] [--out
    docs/results/mnist_authors.json]

784-300-100-10 without biases, densities 1 / 3 / 30 % (K = 3552 of 266200), batch 10, SGD of rate
0.5 times 0.8 per epoch, 10 epochs, no validation split: the test set is looked at once per run, at
its end. Each run is the command's own (`rewire train`), in a process of its own. Prints a Markdown
table and writes every run's result as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SETTING = [
    *(
        "--data",
        "mnist",
        "--hidden",
        "300,100",
        "--no-bias",
        "--density",
        "0.01,0.03,0.3",
        "--batch-size",
        "10",
    ),
    *("--optimizer", "sgd", "--lr", "0.5", "--lr-decay", "0.8", "--validation", "0"),
]
_DEEP_R = ["--method", "deep-r", "--init", "dense", "--set", "l1=1e-5", "--set", "noise=1e-5"]
RUNS: dict[str, list[str]] = {
    "DEEP R, fixed signs": _DEEP_R,
    "DEEP R, redrawn signs": [*_DEEP_R, "--set", "signs=redrawn"],
    "SET": ["--method", "set", "--set", "until_epochs=10", "--init", "dense"],
    "SET, started at sparse fan-in": [
        *["--method", "set", "--set", "until_epochs=10", "--init", "sparse"]
    ],
    "fixed random": ["--method", "static", "--init", "dense"],
    "fixed random, started at sparse fan-in": ["--method", "static", "--init", "sparse"],
}
PAPER = {"DEEP R, fixed signs": "96.2 %"}


def train(arguments: list[str], seed: int, data_dir: str, epochs: int) -> dict[str, Any]:
    """One run of the command line; what its result.json says."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "rewire",
            "train",
            *SETTING,
            *arguments,
            "--epochs",
            str(epochs),
            "--seed",
        ]
        command += [
            str(seed),
            "--threads",
            "1",
            "--data-dir",
            data_dir,
            "--run-dir",
            str(run_dir),
            "--quiet",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
        return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print("| method | connections | test accuracy, mean | each seed | paper | seconds, median |")
    print("| --- | --- | --- | --- | --- | --- |")
    results = {}
    for name, arguments in RUNS.items():
        with ThreadPoolExecutor(options.jobs) as pool:
            each = (
                pool.submit(train, arguments, s, options.data_dir, options.epochs)
                for s in range(options.seeds)
            )
            runs = [future.result() for future in list(each)]
        results[name] = runs
        accuracy = [100 * run["test_accuracy"] for run in runs]
        print(
            f"| {name} | {runs[0]['connections']} | {statistics.mean(accuracy):.2f} % | "
            f"{', '.join(f'{a:.2f}' for a in accuracy)} | {PAPER.get(name, '-')} | "
            f"{statistics.median(run['seconds'] for run in runs):.0f} |",
            flush=True,
        )
    if options.out:
        report = {
            "setting": SETTING,
            "epochs": options.epochs,
            "machine": platform.processor() or platform.machine(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

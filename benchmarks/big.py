"""What no dense layer can be: the line from 10^4 to 10^8 connections, 10^6 x 10^6, and 1.8 million
neurons.

    python benchmarks/big.py [--quick] [--threads N] [--data leukemia lung] [--out FOLDER]
    python benchmarks/big.py --updates [METHOD ...] [--quick] [--threads N] [--out FOLDER]

P10 and P11 as `rewire bench --targets p10,p11` has them, then an epoch of the SET authors' largest
network (three hidden layers of 600,000) on synthetic data of the shape of leukemia (7070 inputs, 72
samples) and lung (3312 inputs, 203 samples; the authors report 112 minutes an epoch there). K =
10^8 needs about 10 GiB of free memory; without, the line is shorter.

With --updates: peak memory and time of one update of each method with O(K) memory (or of those
named) on a layer of 10^6 x 10^6 with K = 10^7, batch 32, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console

from rewire.app.bench import run as command
from rewire.app.bench import sections, tables, targets
from rewire.app.bench.curves import Setting
from rewire.app.bench.targets import big


def one_update(names: list[str], options: argparse.Namespace) -> None:
    """Measures the methods, prints the table and adds the figures to updates.json."""
    size, connections = (10**4, 10**5) if options.quick else (10**6, 10**7)
    setting = Setting(options.threads or torch.get_num_threads(), quick=options.quick)
    target = targets.Target(
        "updates",
        f"peak of one update, {size:,} x {size:,}, K = {connections:,}",
        lambda s: big.updates(s, names, size, connections),
    )
    result = targets.run(target, setting).to_json()
    Console(highlight=False).print(tables.target(result).printed())
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "updates.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | result["data"], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="up to 10^7 connections, a twentieth of the neurons"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--data", nargs="*", choices=sorted(sections.WIDE), default=sorted(sections.WIDE)
    )
    parser.add_argument("--updates", nargs="*", choices=big.with_sparse_memory(), metavar="METHOD")
    parser.add_argument("--out", type=Path, default=Path("runs/big"))
    options = parser.parse_args()
    if options.updates is not None:
        one_update(options.updates or big.with_sparse_memory(), options)
        return
    run = command.Run(
        quick=options.quick, threads=options.threads, out=options.out, names=["p10", "p11"]
    )
    run.everything()
    epochs = []
    for data in options.data:
        epochs.append(sections.wide(run.setting, print, data))
        print(tables.wide(epochs[-1]))
    (options.out / "wide.json").write_text(json.dumps(epochs, indent=1) + "\n")


if __name__ == "__main__":
    main()

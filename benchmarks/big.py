"""What no dense layer can be: the line from 10^4 to 10^8 connections, 10^6 x 10^6, and 1.8 million neurons.

    python benchmarks/big.py [--quick] [--threads N] [--data leukemia lung] [--out FOLDER]

P10 and P11 as `rewire bench --bars p10,p11` has them, then an epoch of the SET authors' largest network (three hidden
layers of 600,000) on synthetic data of the shape of leukemia (7070 inputs, 72 samples) and lung (3312 inputs, 203
samples; the authors report 112 minutes an epoch there). K = 10^8 needs about 10 GiB of free memory; without, the line
is shorter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rewire.bench import command, sections, tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 10^7 connections, a twentieth of the neurons")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data", nargs="*", choices=sorted(sections.WIDE), default=sorted(sections.WIDE))
    parser.add_argument("--out", type=Path, default=Path("runs/big"))
    options = parser.parse_args()
    run = command.Run(quick=options.quick, threads=options.threads, out=options.out, names=["p10", "p11"])
    run.everything()
    epochs = []
    for data in options.data:
        epochs.append(sections.wide(run.setting, print, data))
        print(tables.wide(epochs[-1]))
    (options.out / "wide.json").write_text(json.dumps(epochs, indent=1) + "\n")


if __name__ == "__main__":
    main()

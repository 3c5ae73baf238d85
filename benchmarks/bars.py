"""The bars P1 to P12, or some of them, without the command line around: for a look while kernels
are worked on.

    python benchmarks/bars.py [p1 p5 ...] [--quick] [--threads N] [--cpu-time] [--out FOLDER]

The same code as `rewire bench --bars p1,p5`, which also draws the grid and the wide network when
nothing is chosen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rewire.app.bench import bars
from rewire.app.bench import run as command
from rewire.app.errors import BenchError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bars", nargs="*", help="of " + ", ".join(bars.BARS))
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller problems")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread and its CPU seconds, on a busy machine"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bars"))
    options = parser.parse_args()
    try:
        command.Run(
            quick=options.quick,
            threads=options.threads,
            cpu_time=options.cpu_time,
            out=options.out,
            names=options.bars or list(bars.BARS),
        ).everything()
    except BenchError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

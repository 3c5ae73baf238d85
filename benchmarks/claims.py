"""Runs recipes of `rewire compare` and keeps what they found, for the page docs/claims.md.

python benchmarks/claims.py --data-dir DIR                       # every recipe, for days
python benchmarks/claims.py --data-dir DIR ternary-mnist --jobs 1

Stopped with Ctrl-C or killed, the same command goes on. A recipe's results are written to
docs/results/claims/NAME.json when all of its runs have ended; --so-far writes what there is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from rewire.app.bench import machine
from rewire.app.studies.command import recipe_names
from rewire.app.studies.results import SUMMARY

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "claims"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", metavar="NAME")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="for the runs")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--so-far", action="store_true", help="keep unfinished results, run none")
    options = parser.parse_args()
    for name in options.recipes or recipe_names():
        folder = options.work / name
        command = ["rewire", "compare", "--recipe", name, "--data-dir", str(options.data_dir)]
        command += ["--out", str(folder), "--study", name]
        command += ["--jobs", "0" if options.so_far else str(options.jobs)]
        code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
        if code:
            sys.exit(code)
        keep(name, folder)


def keep(name: str, folder: Path) -> None:
    """Write the results of a study, with the machine they come from."""
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    about = machine.describe(None)
    result = {
        "recipe": name,
        "command": f"rewire compare --recipe {name}",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {key: about[key] for key in ("cpu", "cores", "kernels", "rewire")},
        "torch": torch.__version__,
        **summary,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The tables of docs/speed.md, from the results of a full run of `rewire bench`.

rewire bench --out runs/bench
python benchmarks/speed_page.py runs/bench/bench.json   # writes docs/results/bench.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rewire.app.bench import tables

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "bench.json"
#: Ways to compute a layer, as the heads of the columns name them.
WAYS = {
    "dense": "`nn.Linear`",
    "onednn": "oneDNN",
    "masked": "masked dense",
    "csr": "`torch.sparse.mm`",
    "sparseprop": "SparseProp",
    "sparselab": "SparseLab",
    "rewire": "rewire",
    "rewire feature-major": "rewire, feature-major",
}


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def machine(results: dict[str, Any]) -> list[str]:
    """Where and when, in one line."""
    m = results["machine"]
    top = tables.ceilings(results["ceilings"])
    return [f"{tables.machine(m).split('; load')[0]}; {m['started'][:10]}; {top}."]


def targets(results: dict[str, Any]) -> list[str]:
    """Every figure that has a target."""
    lines = [_row("target", "figure", "measured", "limit", "", "note"), _row(*["---"] * 6)]
    for target in results["targets"]:
        for f in target["figures"]:
            if f["target"] is None:
                continue
            verdict = "met" if f["met"] else "**missed**"
            limit = f"{f['sense']} {tables.number(f['target'], f['unit'])}"
            lines.append(
                _row(
                    target["name"].upper(),
                    f["name"],
                    tables.number(f["value"], f["unit"]),
                    limit,
                    verdict,
                    f["note"],
                )
            )
    return lines


def grid(results: dict[str, Any]) -> list[str]:
    """Milliseconds of every way to compute a layer, forward and backward."""
    lines = [_row("layer, batch", "density", *WAYS.values()), _row(*["---"] * (2 + len(WAYS)))]
    for curve in results["grid"]:
        size = f"{curve['outputs']} x {curve['inputs']}, {curve['batch']}"
        for i, density in enumerate(curve["densities"]):
            seconds = [curve["seconds"].get(way) for way in WAYS]
            lines.append(
                _row(
                    size,
                    f"{density:.0%}",
                    *("" if s is None else f"{1e3 * s[i]:.3g}" for s in seconds),
                )
            )
    return lines


def large(results: dict[str, Any]) -> list[str]:
    """The line of P10: a training step of a 30,000 x 30,000 layer."""
    points = next(
        target["data"]["points"] for target in results["targets"] if target["name"] == "p10"
    )
    lines = [_row("connections", "step, ms", "ns a connection", "memory, MiB"), _row(*["---"] * 4)]
    for p in points:
        each = 1e9 * p["seconds"] / p["connections"]
        lines.append(
            _row(
                f"{p['connections']:,}",
                f"{1e3 * p['seconds']:.3g}",
                f"{each:.3g}",
                f"{p['bytes'] / 2**20:,.0f}",
            )
        )
    return lines


def wide(results: dict[str, Any]) -> list[str]:
    """The perceptron with 1.8 million neurons."""
    return [tables.wide(results["wide"]) + "."]


def headline(results: dict[str, Any]) -> str:
    """What README says."""
    # Names are unique within a target only: P4 has layers of the same names.
    figures = {
        (target["name"], f["name"]): f["value"]
        for target in results["targets"]
        for f in target["figures"]
    }
    over = {
        density: [
            figures["p1", f"{size} x {size}, {density}, 128 rows, over nn.Linear"]
            for size in (1024, 4096)
        ]
        for density in ("10%", "5%", "1%")
    }
    shown = ", ".join(f"{between(o)} times at {density[:-1]} %" for density, o in over.items())
    breaks = figures["p3", "break-even with nn.Linear, contiguous"]
    return (
        "Forward and backward of a 1024 x 1024 or 4096 x 4096 layer at batch 128, beside "
        "`nn.Linear` on the same two\n"
        f"cores: {shown} of the connections; both take equally long\n"
        f"at {breaks:.0f} %. All targets, with misses: [docs/speed.md](docs/speed.md)."
    )


def between(values: list[float]) -> str:
    """The range of some figures, in whole numbers."""
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


PARTS = (machine, targets, grid, large, wide)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    results = json.loads(parser.parse_args().results.read_text())
    RESULTS.write_text(json.dumps(results, indent=None, separators=(",", ":")) + "\n")
    print(headline(results), end="\n\n")
    for part in PARTS:
        print("\n".join(part(results)), end="\n\n")


if __name__ == "__main__":
    main()

"""A keyword-spotting network on spoken digits within a fan-in, scored by NeuroBench.

    python benchmarks/neurobench_keywords.py --data-dir DIR [--epochs 6] [--seeds 2]
        [--out docs/results/neurobench.json] [--page docs/guides/hardware_budgets.md] [--no-runs]

DIR holds the Free Spoken Digit Dataset as for `rewire train --data fsdd`. Needs NeuroBench and
snnTorch, of which only the static metrics are used; their data sets have large requirements that do
without: pip install --no-deps neurobench snntorch.

NeuroBench's `ConnectionSparsity` looks for the layers of `torch.nn`, and passes sparse layers over.
So it is asked about the dense twin, where it counts zeros, and `Connections`, a metric of the same
interface, counts what the sparse layers do not have. The two differ by connections of value 0.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rewire
from rewire.app import data
from rewire.app.data import FileOptions
from rewire.app.train import loop
from rewire.app.train.config import make_config
from rewire.app.train.rebuild import load_network
from rewire.app.train.run_dir import RunDir

FAN_IN = 40
DENSITY = 0.1
METHODS = ("dense", "deep-r", "set")
BEGIN, END = "<!-- begin of the NeuroBench table -->", "<!-- end of the NeuroBench table -->"


class Keywords(nn.Module):
    """Three convolutions over time, the mean over time, and a linear layer."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, width) in enumerate(((features, 5), (64, 5), (64, 3))):
            layers += [nn.Conv1d(before, 64, width, stride=2), nn.BatchNorm1d(64), nn.ReLU()]
            layers += [nn.Dropout(0.2)] if number == 2 else []
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, steps, features) -> (batch, outputs)."""
        out: Tensor = self.head(self.layers(x.transpose(1, 2)).mean(2))
        return out


def network(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The network for `rewire train --model`."""
    return Keywords(shape[1], outputs)


def scores(model: nn.Module) -> dict[str, Any]:
    """What NeuroBench says of a finished network, and what its sparse layers say themselves."""
    from neurobench.metrics.abstract import StaticMetric
    from neurobench.metrics.static import ConnectionSparsity
    from neurobench.models import TorchModel

    class Connections(StaticMetric):  # type: ignore[misc]
        """The share of positions without a connection, by the sparse layers' own count. O(K)."""

        def __call__(self, model: Any) -> float:
            weights = [
                (weight.connections, weight.size)
                for _, weight in rewire.sparse_weights(model.__net__())
            ]
            return round(1 - sum(k for k, _ in weights) / sum(m for _, m in weights), 4)

    sparse = list(rewire.sparse_weights(model))
    twin = rewire.densify(copy.deepcopy(model))
    return {
        "connection_sparsity": ConnectionSparsity()(TorchModel(twin)),
        "own_count": Connections()(TorchModel(model)) if sparse else None,
        "fan_in": max((int(w.fan_in().max()) for _, w in sparse), default=None),
        "connections": sum(w.connections for _, w in sparse) or None,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and score each method with each seed."""
    samples = data.load("fsdd", data_dir=arguments.data_dir, options=FileOptions())
    results: dict[str, list[dict[str, Any]]] = {}
    for method in METHODS:
        for seed in range(arguments.seeds):
            options: dict[str, Any] = {"model": f"{Path(__file__).stem}:network", "method": method}
            options |= {"data": "fsdd", "epochs": arguments.epochs, "seed": seed, "threads": 1}
            if method != "dense":
                options |= {"density": [DENSITY], "distribution": "uniform", "fan_in": FAN_IN}
            with tempfile.TemporaryDirectory() as folder:
                result = loop.run(make_config(options), samples, RunDir(Path(folder)))
                model, _ = load_network(Path(folder))
            found = {"accuracy": result["test_accuracy"], **scores(model)}
            print(method, seed, found, flush=True)
            results.setdefault(method, []).append(found)
    return {
        "epochs": arguments.epochs,
        "density": DENSITY,
        "fan_in": FAN_IN,
        "torch": torch.__version__,
        "results": results,
    }


def table(report: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        "| method | connections | largest fan-in | connection sparsity, NeuroBench | own count | "
        "test accuracy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, runs in report["results"].items():
        accuracy = statistics.mean(r["accuracy"] for r in runs)
        count, fan_in = runs[0]["connections"], max(r["fan_in"] or 0 for r in runs)
        sparsity = statistics.mean(r["connection_sparsity"] for r in runs)
        shown = ("all", "all") if count is None else (f"{count:,}", str(fan_in))
        own = "-" if count is None else f"{statistics.mean(r['own_count'] for r in runs):.4f}"
        cells = (method, *shown, f"{sparsity:.4f}", own, f"{100 * accuracy:.1f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and put the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/results/neurobench.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/guides/hardware_budgets.md"))
    parser.add_argument("--no-runs", action="store_true", help="make the table of what is there")
    arguments = parser.parse_args()
    if not arguments.no_runs:
        arguments.out.write_text(json.dumps(run(arguments), indent=1) + "\n")
    text = arguments.page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    found = table(json.loads(arguments.out.read_text()))
    arguments.page.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{after}")


if __name__ == "__main__":
    main()

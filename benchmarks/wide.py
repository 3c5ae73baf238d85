"""Wide data: sparse networks beside scikit-learn's classifiers, by cross-validation.

    python benchmarks/wide.py --data-dir DIR [--data leukemia,isolet,madelon] [--folds 5]
        [--out docs/results/wide.json] [--page docs/guides/wide_tabular_data.md] [--no-runs]

DIR holds the .mat files of the scikit-feature repository (https://jundongl.github.io/scikit-feature)
in a folder skfeature/, as for `rewire train`. Every classifier runs in a pipeline behind
`StandardScaler`, on the same stratified folds, with the defaults of its library; the sparse
networks have at most 1 % of the connections of the dense network of their size. For them the script
also measures how stable the choice of features is: the mean Jaccard index of the 20 strongest
features of each two folds (two random choices of 20 among 500 features reach 0.02).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from scipy.io import loadmat
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from rewire.nn import sparse_weights
from rewire.sklearn import SparseMLPClassifier

FILES = {"leukemia": "leukemia.mat", "isolet": "Isolet.mat", "madelon": "madelon.mat"}
STRONGEST = 20
BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"
#: Hidden neurons: a dense network of this size is what the budget is a hundredth of.
HIDDEN = {"leukemia": (100,), "isolet": (1000,), "madelon": (400,)}


def classifiers(data: str) -> dict[str, Any]:
    """The classifiers by name."""
    sparse = {
        f"rewire, {method}": SparseMLPClassifier(
            HIDDEN[data], method=method, density=0.01, random_state=0
        )
        for method in ("set", "rigl", "deep-r")
    }
    return {
        "LogisticRegression": LogisticRegression(max_iter=1000),
        "LinearSVC": LinearSVC(),
        "RandomForestClassifier": RandomForestClassifier(random_state=0),
        "MLPClassifier": MLPClassifier(random_state=0),
        **sparse,
    }


def overlap(choices: list[np.ndarray]) -> float:
    """The mean Jaccard index of each two choices of features."""
    pairs = itertools.combinations(map(set, choices), 2)
    return statistics.mean(len(a & b) / len(a | b) for a, b in pairs)


def measure(data: str, name: str, classifier: Any, folder: Path, folds: int) -> dict[str, Any]:
    """Accuracies of the folds, and what is known of the network."""
    file = loadmat(folder / "skfeature" / FILES[data])
    x, y = file["X"].astype(np.float32), file["Y"].ravel()
    scores, choices, found = [], [], {}
    begun = time.process_time()
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=0).split(x, y):
        model = make_pipeline(StandardScaler(), clone(classifier))
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # scikit-learn's own, of training that has not converged
            model.fit(x[train], y[train])
        scores.append(float(model.score(x[test], y[test])))
        if isinstance(classifier, SparseMLPClassifier):
            choices.append(np.argsort(model[1].feature_importances_)[-STRONGEST:])
            weights = [weight for _, weight in sparse_weights(model[1].network_)]
            found["connections"] = sum(weight.connections for weight in weights)
            found["possible"] = sum(weight.size for weight in weights)
    if choices:
        found["stability"] = overlap(choices)
    return {"scores": scores, "cpu_seconds": time.process_time() - begun, **found}


def table(runs: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "| data | classifier | accuracy, % | connections | stability of features |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, run in runs.items():
        data, name = key.split(" ", 1)
        scores = [100 * score for score in run["scores"]]
        error = statistics.stdev(scores) / len(scores) ** 0.5
        k = f"{run['connections']:,} of {run['possible']:,}" if "connections" in run else "-"
        stable = f"{run['stability']:.2f}" if "stability" in run else "-"
        lines.append(
            f"| {data} | {name} | {statistics.mean(scores):.1f} ± {error:.1f} | {k} | {stable} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--data", default=",".join(FILES))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/wide.json"))
    parser.add_argument("--page", type=Path, help="the page that the table is written into")
    parser.add_argument("--no-runs", action="store_true", help="train nothing")
    options = parser.parse_args()
    runs = json.loads(options.out.read_text())["runs"] if options.out.exists() else {}
    for data in () if options.no_runs else options.data.split(","):
        for name, classifier in classifiers(data).items():
            if f"{data} {name}" in runs:
                continue
            runs[f"{data} {name}"] = measure(
                data, name, classifier, options.data_dir, options.folds
            )
            found = {"scikit-learn": sklearn.__version__, "folds": options.folds, "runs": runs}
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            print(table(runs).splitlines()[-1], flush=True)
    if options.page:
        text = options.page.read_text()
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        options.page.write_text(f"{before}{BEGIN}\n\n{table(runs)}\n\n{END}{after}")


if __name__ == "__main__":
    main()

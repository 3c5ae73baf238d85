"""P15: a training step of a mini-GPT with RigL, against the same with SparseLab, and against dense.

The sizes are those that SparseLab publishes: 8 layers of width 640, feed-forward layers at 90 %
sparsity and attention at 70 %.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rewire import methods
from rewire import nn as layers
from rewire.app.bench.contenders import can_make, sparselab_layer
from rewire.app.bench.curves import Setting
from rewire.app.bench.timing import Contender, Timings, timed
from rewire.app.bench.verdict import Figure, Measured, at_most, info, missing
from rewire.app.models.sequences import GPT

__all__ = ["GPT_40M", "Size", "gpt_40m", "step"]

#: Density by the names of layers.
DENSITY = {"*.attention.*": 0.3, "*.up": 0.1, "*.down": 0.1}
#: Steps from one update of RigL to the next (its paper, and SparseLab's default).
EVERY = 100
#: P15: most of SparseLab's and of dense's time for a step.
P15 = {"sparselab": 0.5, "dense": 0.6}


@dataclass(frozen=True)
class Size:
    """Of a mini-GPT and its batches."""

    layers: int = 8
    width: int = 640
    tokens: int = 96
    steps: int = 128
    batch: int = 8

    def model(self) -> GPT:
        """A dense one."""
        return GPT(self.steps, self.tokens, self.layers, self.width)


GPT_40M = Size()


def gpt_40m() -> nn.Module:
    """The dense mini-GPT of 40 million weights."""
    return GPT_40M.model()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)


def _step(
    model: nn.Module, size: Size, optimizer: torch.optim.Optimizer, after: Callable[[], object]
) -> Callable[[], None]:
    """Forward, loss, backward, optimizer, and ``after``."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(size.tokens, (2, size.batch, size.steps), generator=generator)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        after()

    return run


def _ours(sparse: nn.Module, size: Size, every: int) -> Callable[[], None]:
    model = copy.deepcopy(sparse)
    optimizer = _optimizer(model)
    method = methods.RigL(model, optimizer, every=every, until=10**9, seed=0)
    return _step(model, size, optimizer, method.step)


def _theirs(sparse: nn.Module, size: Size, every: int) -> Callable[[], None]:
    """SparseLab's layers with the same connections and values, under its RigL."""
    from sparselab import RigL

    model = copy.deepcopy(sparse)
    rules = []
    for name, module in list(model.named_modules()):
        if isinstance(module, layers.SparseLinear):
            with torch.no_grad():
                twin = sparselab_layer(module.weight.to_dense(), module.bias)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, twin)
            rule: Any = RigL(sparsity=1 - module.weight.density, update_freq=every, seed=0)
            twin.apply(rule)
            rules.append(rule)

    def after() -> None:
        for rule in rules:
            rule.step()

    return _step(model, size, _optimizer(model), after)


def step(setting: Setting, size: Size | None = None) -> Measured:
    """P15: a step on average, with an update of RigL in every hundredth."""
    size = size or (Size(layers=2) if setting.quick else GPT_40M)
    torch.manual_seed(0)
    dense = size.model()
    sparse = layers.sparsify(copy.deepcopy(dense), density=DENSITY)
    contenders = [Contender("dense", _step(dense, size, _optimizer(dense), lambda: None))]
    makers = {"rewire": _ours}
    if can_make("sparselab"):
        makers["sparselab"] = _theirs
    for name, make in makers.items():  # no update comes while it is measured
        contenders.append(Contender(name, make(sparse, size, 10**6)))
    timings = setting.contest(contenders)
    mean = {"dense": timings.seconds["dense"]}
    updates = {}
    for name, make in makers.items():
        updating = make(sparse, size, 1)
        # the better of two: an update of SparseLab takes tens of seconds
        best = min(timed(setting.clock, updating) for _ in range(2))
        updates[name] = best - timings.best(name)
        mean[name] = [x + updates[name] / EVERY for x in timings.seconds[name]]
    means = Timings(mean)
    title = f"{size.layers} layers of width {size.width}, {size.batch} x {size.steps} tokens"
    figures: list[Figure] = []
    for other, target in P15.items():
        if other in mean:
            shown = "SparseLab" if other == "sparselab" else "dense"
            note = f"{1e3 * means.median('rewire'):.4g} / {1e3 * means.median(other):.4g} ms"
            ratio = means.ratio("rewire", other)
            figures.append(at_most(f"{title}, a step over {shown}'s", ratio, target, "x", note))
    if "sparselab" not in mean:
        reason = "SparseLab is not installed: pip install 'torch-rewire[bench]'"
        figures.append(missing("a step over SparseLab's", reason))
    for name, took in updates.items():
        figures.append(info(f"an update of RigL, {name}", 1e3 * took, "ms", f"every {EVERY} steps"))
    return figures, {"seconds": {name: means.median(name) for name in mean}}

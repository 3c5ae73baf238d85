"""Magnitude pruning after Han et al.: prune, retrain, and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from rewire.methods.core.base import Evaluate
from rewire.methods.core.parameters import Count, Epochs, NonNegative, setting
from rewire.methods.core.registry import register
from rewire.methods.core.runs import Run
from rewire.methods.pruning.shrink import Shrinking, scope_field

__all__ = ["Magnitude"]


@register(
    name="magnitude",
    paper="Han, Pool, Tran, Dally, NeurIPS 2015 (arXiv 1506.02626)",
    summary="train, drop the smallest weights of each layer, retrain the others from their "
    "values, and again",
    guarantees=(
        "K of every cycle exact (percentile mode), and in the model that finalize returns",
        "survivors keep their values",
        "what is dropped never returns",
    ),
)
class Magnitude(Shrinking):
    """Prune-retrain cycles: after every ``every_epochs`` epochs, ``cycles`` times, drop the
    smallest weights.

    Percentile (the default): cut i of n leaves K_i = K_0 (K / K_0)^(i / n) connections of a layer
    that began with K_0, an exponential schedule that ends exactly at its budget K. Quality (the
    paper's): drop |w| < q std(w) in each layer, std over the connections it has.

    Survivors keep values and optimizer state and are retrained. The paper retrains with a tenth of
    the learning rate: let your scheduler do it at the first cut (at ``every_epochs`` epochs);
    nothing here changes learning rates.

    Cuts that the training had no time for are made by finalize. Cost: that of the connections there
    are.
    """

    cycles: Count = setting(default=5, help="number of cuts")
    every_epochs: Epochs = setting(default=2, help="epochs of training before each cut")
    quality: NonNegative | None = setting(
        default=None,
        help="q, the threshold over the standard deviation; None for percentiles. With a final "
        "budget as well, no cut goes below it, and the last one ends there; without, no budget is "
        "needed",
    )
    scope: Literal["layer", "network"] = scope_field(
        "layer", "of the percentile: each layer, or magnitudes of the whole network together"
    )

    saves = ("_first", "cuts")

    @classmethod
    def run_options(cls, run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
        """All cuts in the first three quarters of the run, so that what is left trains on."""
        first = max(1, 3 * run.epochs // 4)
        each, many = given.get("every_epochs", 1), given.get("cycles", 5)
        if not all(isinstance(n, int) and n > 0 for n in (each, many)):
            return {}  # to be refused with what is allowed
        options = {
            "cycles": max(1, min(5, first // each)),
            "every_epochs": max(1, first // min(many, first)),
        }
        return {name: value for name, value in options.items() if name not in given}

    def _check(self) -> None:
        if self.quality is not None and self.scope == "network":
            raise ValueError(
                "quality= prunes each layer by its own standard deviation: use scope='layer'"
            )
        self.budget_required = self.quality is None

    def _setup(self) -> None:
        super()._setup()
        self._first = [pool.weight.connections for pool in self.pools]
        self.cuts = 0

    def _schedule(self) -> str | None:
        return f"every_epochs={self.every_epochs}"

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        # At the last epoch all that `finalize` would cut, before it is scored.
        if last and self.final is not None and self.cuts < self.cycles:
            self.cuts = self.cycles
            self._cut(self._targets())
        elif self.epochs % self.every_epochs == 0 and self.cuts < self.cycles:
            self.cuts += 1
            self._cut(self._targets())

    def _targets(self) -> list[int]:
        """Connections of every pool after cut number ``self.cuts``."""
        share = self.cuts / self.cycles
        if self.final is not None and (self.quality is None or self.cuts == self.cycles):
            # Exact at the last cut: x ** 1.0 times its inverse may round.
            return [
                f if self.cuts == self.cycles else max(f, round(k * (f / k) ** share))
                for k, f in zip(self._first, self.final, strict=True)
            ]
        counts = []
        for i, pool in enumerate(self.pools):
            values = pool.weight.values.detach()[pool.weight.active()]
            assert self.quality is not None
            spread = torch.std(values, unbiased=False)
            left = int((values.abs() >= self.quality * spread).sum())
            counts.append(max(left, self.final[i] if self.final is not None else 1))
        return counts

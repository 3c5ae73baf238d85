"""One-shot magnitude pruning: train, cut once, go on with what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from rewire.methods.core.base import Evaluate, Pool
from rewire.methods.core.registry import register
from rewire.methods.core.settings import choice
from rewire.methods.pruning.shrink import Connections, Density, Shrinking

__all__ = ["OneShot"]


@register(
    name="one-shot",
    paper="baseline: Han et al., NeurIPS 2015 (arXiv 1506.02626), with a single cut",
    summary="train with all connections, drop the smallest weights once, train the rest",
    keeps_budget="every update",
    guarantees=(
        "K exact from the cut on, and in the model that finalize returns",
        "survivors keep their values",
    ),
    memory="O(M)",
)
class OneShot(Shrinking):
    """Train the connections there are; once, drop all but the K of largest magnitude; train those
    on.

    Survivors keep values and optimizer state. Han et al. train them with a tenth of the learning
    rate.

    Args:
        after: training before the cut, in ``unit``; at least 1.
        unit: "epoch" or "step" (an optimizer step). Where training ends before that
            (``end_epoch(last=True)`` or finalize), the cut is made there.
        scope: "layer" cuts each layer to its own budget, "network" compares magnitudes over all
            layers.
        connections, density, distribution: the final budget, see
            `rewire.methods.pruning.shrink.final_budgets`.

    Cost: that of the connections there are: O(M) before the cut if all are, O(K) afterwards.
    """

    @classmethod
    def run_options(cls, epochs: int, given: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
        """The cut in the middle of the run, so that what is left trains on."""
        return (
            {}
            if "after" in given or given.get("unit", "epoch") != "epoch"
            else {"after": max(1, epochs // 2)}
        )

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        after: int = 5,
        unit: Literal["epoch", "step"] = "epoch",
        scope: Literal["layer", "network"] = "layer",
        connections: Connections | None = None,
        density: Density | None = None,
        distribution: str = "erk",
        seed: int | None = None,
    ) -> None:
        choice("unit", unit, ("epoch", "step"))
        if not isinstance(after, int) or after < 1:
            raise ValueError(f"after must be a whole number of at least 1 ({unit}s), not {after!r}")
        self.after, self.unit, self.done = after, unit, False
        super().__init__(
            model,
            optimizer,
            connections=connections,
            density=density,
            distribution=distribution,
            scope=scope,
            seed=seed,
        )

    def _schedule(self) -> str | None:
        return f"after={self.after} {self.unit}s"

    def _after_step(self, pools: list[Pool]) -> None:
        if self.unit == "step" and not self.done and self.steps >= self.after:
            self._cut_once()

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        if not self.done and (last or (self.unit == "epoch" and self.epochs >= self.after)):
            self._cut_once()

    def _cut_once(self) -> None:
        assert self.final is not None
        self._cut(self.final)
        self.done = True

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"after": self.after, "unit": self.unit}

    def _state(self) -> dict[str, Any]:
        return {"done": self.done}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.done = bool(state["done"])

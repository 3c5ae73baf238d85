"""One-shot magnitude pruning: train, cut once, go on with what is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from rewire.methods.core.base import Evaluate, Pool
from rewire.methods.core.parameters import Epochs, Steps, setting
from rewire.methods.core.registry import register
from rewire.methods.core.runs import Run
from rewire.methods.pruning.shrink import Shrinking, scope_field

__all__ = ["OneShot"]


@register(
    name="one-shot",
    paper="baseline: Han et al., NeurIPS 2015 (arXiv 1506.02626), with a single cut",
    summary="train with all connections, drop the smallest weights once, train the rest",
    guarantees=(
        "K exact from the cut on, and in the model that finalize returns",
        "survivors keep their values",
    ),
)
class OneShot(Shrinking):
    """Train the connections there are; once, drop all but the K of largest magnitude; train those
    on.

    Survivors keep values and optimizer state. Han et al. train them with a tenth of the learning
    rate.

    Where training ends before the cut (``end_epoch(last=True)`` or finalize), it is made there.

    Cost: that of the connections there are: O(M) before the cut if all are, O(K) afterwards.
    """

    after_epochs: Epochs | None = setting(
        default=None, help="training before the cut; 5 epochs without this and ``after``"
    )
    after: Steps | None = setting(default=None, help="the same in optimizer steps")
    scope: Literal["layer", "network"] = scope_field(
        "layer", "cut each layer to its own budget, or compare magnitudes over all layers"
    )

    done = False
    saves = ("done",)

    @classmethod
    def run_options(cls, run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
        """The cut in the middle of the run, so that what is left trains on."""
        timed = {"after", "after_epochs"} & given.keys()
        return {} if timed else {"after_epochs": max(1, run.epochs // 2)}

    def _check(self) -> None:
        if self.after is not None and self.after_epochs is not None:
            raise ValueError("give after= (optimizer steps) or after_epochs=, not both")
        if self.after is None and self.after_epochs is None:
            self.after_epochs = 5

    def _schedule(self) -> str | None:
        steps = self.after is not None
        return f"after={self.after} steps" if steps else f"after_epochs={self.after_epochs}"

    def _after_step(self, pools: list[Pool]) -> None:
        if self.after is not None and not self.done and self.steps >= self.after:
            self._cut_once()

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        due = self.after_epochs is not None and self.epochs >= self.after_epochs
        if not self.done and (last or due):
            self._cut_once()

    def _cut_once(self) -> None:
        assert self.final is not None
        self._cut(self.final)
        self.done = True

"""RigL: rigging the lottery."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from rewire.methods.core.base import Moments
from rewire.methods.core.registry import register
from rewire.methods.core.updates import decay, in_steps
from rewire.methods.criteria.drop import Magnitude
from rewire.methods.criteria.gradients import CandidateCount
from rewire.methods.criteria.grow import Gradient
from rewire.methods.dynamic.rewirer import Rewirer
from rewire.schedules import Schedule

__all__ = ["RigL"]


@register(
    name="rigl",
    paper="Evci et al., ICML 2020 (arXiv 1911.11134)",
    summary="every 100 steps, replace the weakest weights by the dormant connections with the "
    "largest gradients",
    keeps_budget="every step",
    guarantees=(
        "K exact in every layer at every moment",
        "exact growth equals a brute-force dense computation",
    ),
    needs="gradients",
)
class RigL(Rewirer):
    """Every ``every`` steps until T_end, in each layer of K connections::

        n     floor(f K),  f(t) = fraction / 2 (1 + cos(pi t / T_end))
        drop  the n smallest |w|
        grow  the n largest |dL/dw| of this step among the positions that are not kept

    New values are 0, their optimizer state starts afresh.

    Args:
        fraction: alpha, the share to replace at the start; a schedule (over steps) is taken as it
            is.
        every: steps between updates (Delta T); by default 100, or in a training of known length as
            often as 10 updates need.
        until: T_end, the last step that may update; by default 3/4 of ``steps`` where those are
            known, else there is no end and the fraction stays.
        candidates: "auto", None (exact) or a number of random dormant positions to look at, see
            `rewire.methods.criteria.grow.Gradient`.
        regrown: what is dropped and grows again starts at 0 ("new", the paper) or has never gone
            ("keep": value and momentum stay, the authors' code).
        skip_step: as in the paper's algorithm and code, a step that updates the topology moves no
            parameter of the optimizer. False: it does both.
        steps: of the whole training; `rewire train` gives it.

    Cost: exact O(M samples) time per update and O(K) memory besides the step's activations; sampled
    O(K samples).
    """

    keeps_limits: ClassVar[tuple[str, ...]] = ("fan-in", "fan-out", "block")

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        fraction: float | Schedule = 0.3,
        every: int | None = None,
        until: int | None = None,
        candidates: CandidateCount = "auto",
        regrown: Literal["new", "keep"] = "new",
        skip_step: bool = True,
        steps: int | None = None,
        moments: Moments = "auto",
        seed: int | None = None,
    ) -> None:
        every, until = in_steps(every, until, 100, steps)
        super().__init__(
            model,
            optimizer,
            drop=Magnitude(),
            grow=Gradient(candidates),
            fraction=decay(fraction, until),
            every=every,
            until=until,
            regrown=regrown,
            moments=moments,
            seed=seed,
        )
        self.skip_step = skip_step
        if skip_step:
            here = weakref.ref(self)

            def updates() -> bool:
                method = here()
                return method is not None and method._updates_at(method.steps + 1)

            self._attachment.skip_steps(updates)

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"regrown": self.regrown, "skip_step": self.skip_step}

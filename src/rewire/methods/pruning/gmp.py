"""GMP: gradual magnitude pruning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from rewire.methods.core.base import Moments, Pool
from rewire.methods.core.registry import register
from rewire.methods.core.updates import in_steps
from rewire.methods.pruning.shrink import Connections, Density, Shrinking
from rewire.schedules import Cubic

__all__ = ["GMP", "Gradual"]


class Gradual(Shrinking):
    """What GMP and GraNet share: budgets that come down along Zhu and Gupta's cubic, cut every so
    many steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        every: int,
        begin: int,
        until: int | None,
        connections: Connections | None,
        density: Density | None,
        distribution: str,
        scope: Literal["layer", "network"],
        seed: int | None,
        moments: Moments = "auto",
    ) -> None:
        if until is None:
            raise ValueError(
                "until, the step of the last cut, must be given where steps= of the "
                "training are not"
            )
        _steps("every", every, 1)
        _steps("until", until, _steps("begin", begin, 0) + 1)
        self.every, self.begin, self.until = every, begin, until
        super().__init__(
            model,
            optimizer,
            connections=connections,
            density=density,
            distribution=distribution,
            scope=scope,
            moments=moments,
            seed=seed,
        )
        self._start = [pool.weight.connections for pool in self.pools]

    def targets(self, step: int) -> list[int]:
        """Connections of each pool at ``step``: K_f + (K_0 - K_f) (1 - (t - begin) / (until -
        begin))^3, rounded.
        """
        assert self.final is not None
        if step >= self.until:
            return list(self.final)
        length = self.until - self.begin
        pairs = zip(self._start, self.final, strict=True)
        return [
            final + round(Cubic(start - final, 0.0, length, self.begin)(step))
            for start, final in pairs
        ]

    def _schedule(self) -> str | None:
        return f"begin={self.begin}, every={self.every}, until={self.until} steps"

    def _cuts_at(self, step: int) -> bool:
        return self.begin <= step <= self.until and (
            step == self.until or (step - self.begin) % self.every == 0
        )

    def _after_step(self, pools: list[Pool]) -> None:
        if self._cuts_at(self.steps):
            self._cut(self.targets(self.steps))

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"every": self.every, "begin": self.begin, "until": self.until}

    def _state(self) -> dict[str, Any]:
        return {"start": list(self._start)}

    def _load_state(self, state: Any) -> None:
        self._start = [int(k) for k in state["start"]]


def _steps(name: str, number: int, least: int) -> int:
    if not isinstance(number, int) or number < least:
        raise ValueError(f"{name} must be a number of steps of at least {least}, not {number!r}")
    return number


@register(
    name="gmp",
    paper="Zhu and Gupta 2017 (arXiv 1710.01878)",
    summary="drop the smallest weights every 100 steps, along a cubic schedule from a dense start",
    keeps_budget="every update",
    guarantees=(
        "the schedule's K exact after every cut",
        "what is dropped never returns",
        "K at the end",
    ),
    memory="O(M)",
)
class GMP(Gradual):
    """Every ``every`` steps from ``begin`` to ``until``, drop the smallest |w| down to, with K_0 at
    the start,

        K_t = K + (K_0 - K) (1 - (t - begin) / (until - begin))^3

    and train what is left. Storage shrinks with it.

    Args:
        every: steps between cuts; by default 100, or in a training of known length as often as 10
            cuts need.
        begin: step of the first cut.
        until: step of the last cut; by default half of ``steps`` where those are known.
        scope: of magnitudes and budget: each "layer" (the paper's uniform schedule), or the
            "network" together.
        connections, density, distribution: the final budget, see
            `rewire.methods.pruning.shrink.final_budgets`.
        steps: of the whole training; `rewire train` gives it.

    Cost: that of the connections there are, from O(M) to O(K).
    """

    start_density: ClassVar[float | None] = 1.0

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        every: int | None = None,
        begin: int = 0,
        until: int | None = None,
        scope: Literal["layer", "network"] = "layer",
        connections: Connections | None = None,
        density: Density | None = None,
        distribution: str = "erk",
        steps: int | None = None,
        seed: int | None = None,
    ) -> None:
        every, until = in_steps(every, until, 100, steps, last=0.5, begin=begin)
        super().__init__(
            model,
            optimizer,
            every=every,
            begin=begin,
            until=until,
            connections=connections,
            density=density,
            distribution=distribution,
            scope=scope,
            seed=seed,
        )

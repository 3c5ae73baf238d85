"""Methods that start with more connections than they may end with: final budgets, and cuts down to
them.

Such a method takes its final budget at construction (``connections=`` or ``density=``, see
`final_budgets`), acts on ordinary pools that were built with more connections (up to all of them,
then memory is O(M)), and gives storage back as it goes: dropped slots are emptied and the pool is
resized, so time and memory follow the connections that are left. Under DDP, whose buckets have a
fixed size, the slots stay, empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from rewire import budget
from rewire.methods.core.base import Method, Pool
from rewire.methods.core.parameters import first_match, parameter

__all__ = ["Connections", "Density", "Shrinking", "final_budgets", "lowest"]

#: A final budget: of the network (a number), or of each pool: in order, or by name or glob pattern.
Connections: TypeAlias = int | Sequence[int] | Mapping[str, int]
Density: TypeAlias = float | Sequence[float] | Mapping[str, float]


def final_budgets(
    pools: Sequence[Pool],
    connections: Connections | None,
    density: Density | None,
    distribution: str = "erk",
) -> list[int]:
    """Connections that each pool may have at the end; one of ``connections`` and ``density`` must
    be given.

    A number is for all pools together and spread by ``distribution`` (see `rewire.budget`). A list
    has one entry per pool. A dict has names or glob patterns of pools (``"0.weight"``) or their
    layers (``"0"``, ``"fc*"``); the first match counts, and every pool needs one. Densities are
    shares of M, the potential connections.

    Raises ValueError for a budget that cannot be, a list of the wrong length, a pattern that
    matches nothing.
    """
    if (connections is None) == (density is None):
        raise ValueError(
            "give exactly one of connections= and density=: what is to be left at the end"
        )
    given: Any = connections if density is None else density
    sizes = [pool.weight.size for pool in pools]
    if isinstance(given, Mapping):
        all_names = [pool.name for pool in pools]
        given = [given[pattern] for pattern in first_match(all_names, list(given), "the budget")]
    elif isinstance(given, Sequence) and len(given) != len(pools):
        names = ", ".join(pool.name for pool in pools)
        raise ValueError(f"the budget has {len(given)} entries for {len(pools)} weights: {names}")
    if isinstance(given, Sequence):
        return [
            budget.allowed(size, *((None, g) if connections is None else (g, None)))
            for size, g in zip(sizes, given, strict=True)
        ]
    total = budget.allowed(sum(sizes), *((None, given) if connections is None else (given, None)))
    return budget.distribute(distribution, [tuple(pool.weight.shape) for pool in pools], total)


def lowest(scores: Sequence[Tensor], keep: int, at_least: int | Sequence[int] = 1) -> list[Tensor]:
    """What to drop so that ``keep`` of all scores are left, the highest, and ``at_least`` of each
    tensor (a number for all, or one for each).

    Returns places in each tensor (int64, ascending). Among equals the first is kept. Where ``keep``
    is below what ``at_least`` asks for, ``at_least`` wins. O(n log n) for n scores.
    """
    order = [torch.sort(s, descending=True, stable=True).indices for s in scores]
    least = [at_least] * len(scores) if isinstance(at_least, int) else at_least
    floor = [min(n, s.numel()) for n, s in zip(least, scores, strict=True)]
    rest = torch.cat([s[o[f:]] for s, o, f in zip(scores, order, floor, strict=True)])
    kept = torch.zeros(rest.numel(), dtype=torch.bool, device=rest.device)
    kept[torch.sort(rest, descending=True, stable=True).indices[: max(keep - sum(floor), 0)]] = True
    dropped = []
    shares = kept.split([s.numel() - f for s, f in zip(scores, floor, strict=True)])
    for o, f, mine in zip(order, floor, shares, strict=True):
        dropped.append(torch.sort(o[f:][~mine]).values)
    return dropped


def frozen_connections(pool: Pool) -> int:
    """How many connections of the pool are frozen."""
    prior = pool.weight.prior
    return 0 if prior is None or prior.frozen is None else prior.frozen.numel()


class Shrinking(Method):
    """What methods share that end with fewer connections than they start with.

    `finalize` cuts by `_scores` what is still above the final budget, so the model it returns is
    always within it. Raises ValueError if the pools have fewer connections than they are to end
    with. With ``scope = "network"`` only the sum over the (trained) pools counts.
    """

    connections: Connections | None = parameter(
        default=None, kind="budget", help="the final budget, see `final_budgets`"
    )
    density: Density | None = parameter(
        default=None, kind="budget", help="the final budget as a share of M"
    )
    distribution: str = parameter(
        default="erk", kind="budget", help="how one number is spread over the pools"
    )

    keeps_budget = "every update"
    memory = "O(M)"
    #: The density that `rewire train` builds the pools with.
    start_density: ClassVar[float | None] = 1.0
    #: What only drops stays within any limits.
    keeps_limits: ClassVar[tuple[str, ...]] = ("fan-in", "fan-out", "block")
    keeps_prior: ClassVar[bool] = True
    #: Whether a final budget must be given.
    budget_required: bool = field(init=False, default=True)
    #: Whether the budget is each layer's or the network's.
    scope: Literal["layer", "network"] = field(init=False, default="layer")
    #: Final connections of each pool, in order; None where there is no budget.
    final: list[int] | None = field(init=False, default=None)

    def _setup(self) -> None:
        given = self.connections is not None or self.density is not None
        if self.budget_required or given:
            self.final = final_budgets(
                self.pools, self.connections, self.density, self.distribution
            )
            self._check_start(self.final)
            self._check_frozen(self.final)

    def _check_start(self, final: Sequence[int]) -> None:
        has = [pool.weight.connections for pool in self.pools]
        if self.scope == "network":
            if sum(final) > sum(has):
                raise ValueError(
                    f"the network has {sum(has)} connections and is to end with {sum(final)}: "
                    "build it with more (density=1 on its layers), or choose a smaller budget"
                )
            return
        for pool, k, f in zip(self.pools, has, final, strict=True):
            if f > k:
                raise ValueError(
                    f"{pool.name} has {k} connections and is to end with {f}: build it with more "
                    "(density=1), or "
                    "choose a smaller budget, another distribution or one number per layer"
                )

    def _check_frozen(self, final: Sequence[int]) -> None:
        frozen = [frozen_connections(pool) for pool in self.pools]
        names = [pool.name for pool in self.pools]
        pairs = list(zip(names, frozen, final, strict=True))
        if self.scope == "network":
            pairs = [("the network", sum(frozen), sum(final))]
        for name, kept, most in pairs:
            if kept > most:
                raise ValueError(
                    f"{name} has {kept} frozen connections and is to end with {most}: choose a "
                    "larger budget, or freeze fewer"
                )

    def _ranked(self, pools: Sequence[Pool], keep: int, at_least: int = 1) -> list[Tensor]:
        """`lowest` of the pools' `_scores`; what is frozen stays."""
        scores = []
        for pool in pools:
            score = self._scores(pool)
            frozen = pool.weight.is_frozen(pool.weight.active())
            scores.append(torch.where(frozen, torch.inf, score) if frozen.any() else score)
        return lowest(scores, keep, [max(at_least, frozen_connections(p)) for p in pools])

    def _scores(self, pool: Pool) -> Tensor:
        """Which connections are worth keeping, in the order of ``pool.weight.active()``: magnitude,
        here.
        """
        return pool.weight.values.detach()[pool.weight.active()].abs()

    def _cut(self, counts: Sequence[int], at_least: int = 1) -> None:
        """Drop the lowest `_scores` until each trained pool has ``counts[pool.number]``
        connections, or, with scope "network", all of them together; ``at_least`` stay in each.
        Pools with fewer are left as they are.
        """
        pools = self._trained()
        groups = [pools] if self.scope == "network" and pools else [[pool] for pool in pools]
        for group in groups:
            keep = sum(counts[pool.number] for pool in group)
            places = self._ranked(group, keep, at_least)
            for pool, gone in zip(group, places, strict=True):
                self._shrink(pool, pool.weight.active()[gone])
        self.updates += 1

    def finalize(self) -> nn.Module:
        """As `Method.finalize`; drops before what is above the final budget."""
        self._warn_of_no_update()
        if self.final is not None and self._attachment.attached:
            pools = self._trained()
            over = [pool.weight.connections - self.final[pool.number] for pool in pools]
            if (sum(over) if self.scope == "network" else max(over, default=0)) > 0:
                with torch.no_grad():
                    self._cut(self.final)
        return super().finalize()

    def _settings(self) -> dict[str, Any]:
        final = None if self.final is None else list(self.final)
        return super()._settings() | {"final": final, "scope": self.scope}


def scope_field(default: Literal["layer", "network"], help: str) -> Any:
    """The declaration of ``scope``, for methods that compare scores over layers."""
    return parameter(default=default, help=help)

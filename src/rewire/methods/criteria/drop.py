"""Which connections to drop: small criteria without state, plugged into a
`rewire.methods.Rewirer`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rewire.methods.core.base import Pool
from rewire.methods.criteria.criterion import Criterion
from rewire.methods.criteria.similarity import Similarity
from rewire.ops import extremes, weakest

__all__ = [
    "BelowOneMagnitude",
    "ByMagnitude",
    "ByMagnitudeAndGradient",
    "ByMagnitudeAndSign",
    "Drop",
    "smallest",
]


class Drop(Criterion):
    """Chooses the connections to drop; a subclass defines ``__call__``.

    It reads a pool in (row, col) order, so that ties never depend on a slot's history, and chooses
    among the connections that are not frozen (`rewire.methods.core.pool.Pool.may_go`); K counts
    these here. Frozen ones that a criterion chooses all the same stay.
    """

    @abstractmethod
    def __call__(self, pool: Pool, fraction: float) -> Tensor:
        """Slots (int64, distinct) of about ``fraction`` of the pool's active connections."""

    def over(self, pools: Sequence[Pool], fraction: float) -> list[Tensor]:
        """The slots to drop of each pool; override it to decide over all layers at once."""
        return [self(pool, fraction) for pool in pools]


def smallest(slots: Tensor, score: Tensor, count: int) -> Tensor:
    """The ``count`` slots of lowest score, in the order of ``slots``; among equals the first.
    O(slots) time.
    """
    return slots[extremes(score, min(max(count, 0), slots.numel()), largest=False)]


@dataclass(frozen=True)
class ByMagnitude(Drop):
    """The ``floor(fraction * K)`` connections of smallest magnitude."""

    def __call__(self, pool: Pool, fraction: float) -> Tensor:
        return weakest(pool.weight.values.detach(), pool.may_go(), fraction)


@dataclass(frozen=True)
class ByMagnitudeAndSign(Drop):
    """SET's rule: ``floor(fraction * n)`` of the n smallest positive and of the n largest negative
    weights.

    source: if given, each weight counts times the similarity of the activations at its ends
        (CosineSET's removal).

    What is exactly 0 counts as the smallest of the positive ones. (The authors' codes drop all
    such, whatever the fraction: connections that no gradient has moved yet and, with similarities,
    those of silent units.)
    """

    source: Similarity | None = None

    def __call__(self, pool: Pool, fraction: float) -> Tensor:
        similarity = self.source.active(pool) if self.source is not None else None
        return weakest(
            pool.weight.values.detach(), pool.may_go(), fraction, by_sign=True, factors=similarity
        )


@dataclass(frozen=True)
class ByMagnitudeAndGradient(Drop):
    """The ``floor(fraction * K)`` connections of smallest ``|w| + weight |g|`` (MEST), g as the
    last step used it.
    """

    weight: float = 1.0

    @property
    def needs(self) -> str:  # type: ignore[override]
        """What a `rewire.methods.Rewirer` keeps for it in ``pool.gradient``."""
        return "last gradient" if self.weight else ""

    def __call__(self, pool: Pool, fraction: float) -> Tensor:
        if not self.weight:
            return ByMagnitude()(pool, fraction)
        values, slots, gradient = pool.weight.values.detach(), pool.may_go().long(), pool.gradient
        if gradient is None:
            raise RuntimeError(
                f"{pool.name} took no part in a step since the last update, so the gradient that "
                "its connections are scored by is not known"
            )
        score = values[slots].abs() + self.weight * gradient[slots].abs()
        return smallest(slots, score, int(fraction * slots.numel()))


@dataclass
class BelowOneMagnitude(Drop):
    """Everything below one magnitude all over the network, which is adapted so that it hits a
    share.

    After each use: doubled where fewer than ``(1 - tolerance)`` of the wanted number were below it,
    halved where more than ``(1 + tolerance)`` were. At least one connection stays in each layer:
    the largest (ties: the last).
    """

    magnitude: float
    tolerance: float = 0.1

    def __call__(self, pool: Pool, fraction: float) -> Tensor:
        return self.over([pool], fraction)[0]

    def over(self, pools: Sequence[Pool], fraction: float) -> list[Tensor]:
        """Slots of each pool that are below the magnitude."""
        found, total = [], 0
        for pool in pools:
            slots = pool.may_go().long()
            size = pool.weight.values[slots].abs()
            below = size < self.magnitude
            if slots.numel() and bool(below.all()):
                below[(size == size.max()).nonzero()[-1]] = False
            found.append(slots[below])
            total += slots.numel()
        wanted, got = fraction * total, sum(slots.numel() for slots in found)
        if got < (1 - self.tolerance) * wanted:
            self.magnitude = min(2 * self.magnitude, 1e30)
        elif got > (1 + self.tolerance) * wanted:
            self.magnitude = max(self.magnitude / 2, 1e-30)
        return found

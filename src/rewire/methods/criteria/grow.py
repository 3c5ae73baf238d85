"""Which connections to grow: small criteria, plugged into a `rewire.methods.Rewirer`, and the
sampling they rest on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from rewire import random, topology
from rewire.methods.core.base import Pool, Purpose
from rewire.methods.criteria import gradients
from rewire.methods.criteria.criterion import Criterion
from rewire.methods.criteria.sampling import fitting, random_dormant, uniform
from rewire.methods.criteria.similarity import Similarity
from rewire.methods.criteria.topk import exponential, top
from rewire.ops import Draw, uniforms

__all__ = [
    "ByGradient",
    "BySimilarity",
    "Grow",
    "Random",
    "Scope",
    "allot",
    "fitting",
    "random_dormant",
    "random_in_rows",
]

#: Over what the budget is kept.
Scope: TypeAlias = Literal["layer", "network", "neuron"]


#: Positions of a weight up to which all of them are scored.
EXACT_POSITIONS = 1 << 28
#: What similarity 0 counts as in a draw: less than any other, but drawn at random when nothing else
#: is left.
_LEAST = 1e-30
#: Positions ranked per connection to grow where limits may refuse some.
_RANKED = 4


class Grow(Criterion):
    """Chooses the connections that a pool grows; a subclass defines ``__call__``.

    Randomness comes from ``(seed, step)`` alone, so that a resumed run makes the same choices.
    """

    #: Kinds of limits (`rewire.budget.Limits`) that what grows keeps.
    keeps_limits: ClassVar[tuple[str, ...]] = ()
    #: Whether what grows is at the pool's allowed positions (`Pool.allowed`).
    keeps_allowed: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, pool: Pool, dropped: Tensor, count: int, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """``count`` positions (rows, cols; int64, distinct) to grow while the slots ``dropped`` go.

        They are dormant then: positions that are just dropped may grow again, so there is always
        room for as many as are dropped.
        """


@dataclass(frozen=True)
class Random(Grow):
    """Uniformly random dormant connections of the pool (SET, DEEP R); under limits, of those that
    fit.
    """

    keeps_limits: ClassVar[tuple[str, ...]] = ("fan-in", "fan-out", "block")
    keeps_allowed: ClassVar[bool] = True

    def __call__(
        self, pool: Pool, dropped: Tensor, count: int, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        return random_dormant(pool, dropped, count, seed, step)


@dataclass(frozen=True)
class BySimilarity(Grow):
    """Dormant connections by the absolute cosine similarity of the activations at their ends.

    Where a pool has no similarities, uniformly random ones. Under limits (`rewire.budget.Limits`)
    the first that fit of 4 times as many, best first; should they not suffice, random ones that
    fit.

    Args:
        source: the similarities, see `rewire.methods.criteria.similarity.Similarity`.
        draw: "top", the most similar ones (among equals the first in (row, col) order), or
            "proportional": drawn one after the other without replacement with P proportional to
            similarity, those of similarity 0 last. For this each position gets the key ``similarity
            / e`` with a standard exponential number e of its own, and the largest keys win: the
            same law (Efraimidis & Spirakis 2006) in one pass.
        candidates: look at so many uniformly random dormant positions per connection to grow
            instead of at all of them; None for all, or for 4 where the weight has more than 2**28
            positions.

    Cost: O(samples M) time, O(tile + count) memory; with candidates O(samples count candidates),
    O(rows + cols + count candidates).
    """

    source: Similarity | None
    draw: Literal["top", "proportional"] = "top"
    candidates: int | None = None
    keeps_limits: ClassVar[tuple[str, ...]] = ("fan-in", "fan-out", "block")
    keeps_allowed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.candidates is not None and (
            not isinstance(self.candidates, int) or self.candidates < 1
        ):
            raise ValueError(
                f"candidates must be a number of at least 1, or None, not {self.candidates!r}"
            )

    def __call__(
        self, pool: Pool, dropped: Tensor, count: int, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        assert self.source is not None
        cosine, weight = self.source.of(pool), pool.weight
        if cosine is None:
            return random_dormant(pool, dropped, count, seed, step)
        each = self.candidates or (4 if weight.positions > EXACT_POSITIONS else None)
        cols, room = weight.matrix_shape[1], weight.dormant + dropped.numel()
        # Of those ranked best not all may fit.
        many = count if weight.limits is None else _RANKED * count
        draw = (
            Draw(seed, step, pool.stream(Purpose.TIES), _LEAST)
            if self.draw == "proportional"
            else None
        )

        def at(rows: Tensor, columns: Tensor) -> Tensor:
            index = topology.build_index(rows, columns, *weight.matrix_shape)
            return cosine.at(index, rows.numel(), rows, columns)

        if each is None:
            rows, columns, scores = top(
                cosine.signed_block, pool, dropped, min(many, room), at=at, absolute=True, draw=draw
            )
        else:
            # Of a stream of their own under limits, where random ones may have to follow.
            purpose = Purpose.GROW if weight.limits is None else Purpose.REDRAW
            rows, columns = uniform(
                pool, dropped, min(max(each * count, many), room), seed, step, purpose
            )
            scores = at(rows, columns)
            if draw is not None:
                scores = torch.nan_to_num(scores, nan=0.0).clamp_(min=_LEAST)
                scores = scores.div_(exponential(uniforms(draw, rows * cols + columns)))
        if weight.limits is None and rows.numel() == count:
            return rows, columns
        best = torch.sort(scores, descending=True, stable=True).indices[:many]
        ranked = rows[best], columns[best]
        return (
            ranked if weight.limits is None else fitting(pool, dropped, ranked, count, seed, step)
        )


@dataclass(frozen=True)
class ByGradient(Grow):
    """Grow the dormant connections with the largest gradient magnitudes (RigL).

    Args:
        candidates: None: of all positions, exactly. A number: of so many uniformly random ones, and
            of what is dropped. "auto": exact where it is affordable, see
            `rewire.methods.criteria.gradients.sampled`.

    Under limits (`rewire.budget.Limits`) the first that fit of the largest few times as many, then
    random ones.
    """

    keeps_limits: ClassVar[tuple[str, ...]] = ("fan-in", "fan-out", "block")
    keeps_allowed: ClassVar[bool] = True

    candidates: gradients.CandidateCount = "auto"
    needs: ClassVar[str] = "gradients"

    def __post_init__(self) -> None:
        gradients.check_candidates(self.candidates)

    def request(self, pool: Pool, seed: int, step: int) -> None:
        """Ask for the gradients of step ``step``, the next one."""
        gradients.request(pool, self.candidates, seed, step)

    def __call__(
        self, pool: Pool, dropped: Tensor, count: int, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        return gradients.best(pool, dropped, count, seed, step)


def random_in_rows(
    pool: Pool, dropped: Tensor, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One new connection in the row of each dropped one: (slots, rows, cols), slots reordered by
    row.
    """
    weight = pool.weight
    rows, order = torch.sort(weight.rows[dropped].long(), stable=True)
    slots = dropped[order]
    cols = topology.sample_dormant_in_rows(
        weight.index,
        *weight.matrix_shape,
        rows,
        weight.cols[slots].long(),
        seed,
        step,
        pool.stream(Purpose.GROW),
        pool.allowed,
    )
    return slots, rows, cols


def allot(
    pools: Sequence[Pool],
    dropped: Sequence[Tensor],
    shares: Sequence[float] | None,
    seed: int,
    step: int,
) -> list[int]:
    """How many of the connections dropped all over the network each pool grows; sums to the number
    dropped.

    ``shares`` None: as a uniform draw over all dormant connections of the network would have it
    (exactly: a uniformly random subset of their union). Otherwise multinomial with probabilities
    proportional to ``shares``, as in DEEP R's code; what a pool has no room for is drawn again
    among the others.
    """
    total = sum(d.numel() for d in dropped)
    room = [p.weight.dormant + d.numel() for p, d in zip(pools, dropped, strict=True)]
    stream = pools[0].stream(Purpose.ALLOT)
    if shares is None:
        ranks = random.distinct(total, sum(room), seed, step, stream)
        edges = torch.tensor(room).cumsum(0)
        bins = torch.searchsorted(edges, ranks, right=True)
        return torch.bincount(bins, minlength=len(pools)).tolist()
    counts, drawn, used = [0] * len(pools), 0, 0
    while drawn < total:
        open_share = torch.tensor(
            [s if c < r else 0.0 for s, c, r in zip(shares, counts, room, strict=True)],
            dtype=torch.float64,
        )
        edges = (open_share / open_share.sum()).cumsum(0)
        # Counters run on over the rounds, so that a round never repeats the numbers of the one
        # before.
        t = torch.arange(used, used + total - drawn, dtype=torch.int64)
        used += t.numel()
        uniform = random.bits(seed, step, stream, t).double() * 2.0**-63
        bins = torch.searchsorted(edges, uniform, right=True).clamp(max=len(pools) - 1)
        for i, n in enumerate(torch.bincount(bins, minlength=len(pools)).tolist()):
            taken = min(n, room[i] - counts[i])
            counts[i] += taken
            drawn += taken
    return counts

"""Gradients of connections that do not exist: asked for before a step, read after it.

Two ways, chosen by ``candidates``:

- exact: the layer keeps its calls of the step (`rewire.ops.Pair`), and tiles of the dense gradient
  are computed of them, with a running top-k: O(M samples) time, never O(M) memory. Not in compiled
  graphs, which cannot be captured.
- sampled: so many uniformly random dormant positions take part in the step as connections of value
  0 (`rewire.nn.Candidates`), and autograd gives their gradients: guided stochastic exploration
  (Heddes et al. 2024), O(K) time and memory, also under `torch.compile`.

Both are of the backward passes whose results are in ``.grad`` when the optimizer steps
(`rewire.methods.core.recording`): summed over micro-batches and the ranks of DDP, without what was
thrown away by ``zero_grad``, of second order too under ``create_graph=True``. They are as backward
gave them; where their scale matters (`Record.scale`), one factor brings them to that of the
optimizer's gradients: averaged by DDP, unscaled by a GradScaler, clipped by norm.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from rewire.distributed import sum_over_ranks
from rewire.methods.core.base import Pool, Purpose
from rewire.methods.core.parameters import check, parameter
from rewire.methods.core.recording import Status
from rewire.methods.criteria.sampling import fitting, random_dormant, uniform
from rewire.methods.criteria.topk import Best, Gradients, recorded, top
from rewire.nn import Candidates

__all__ = [
    "CandidateCount",
    "best",
    "best_candidates",
    "candidates_field",
    "check_candidates",
    "probed",
    "request",
    "sampled",
    "status",
    "waits",
]

#: None: exact. A number: sampled, so many. "auto": see `sampled`.
CandidateCount: TypeAlias = int | Literal["auto"] | None

#: Positions ranked per connection to grow where limits may refuse some.
RANKED = 4

#: "auto" is exact for weights of up to so many positions, whatever their density ...
SMALL = 1 << 20
#: ... and for those of up to so many positions per connection: one dense product then costs about
#: as much as ten steps of a sparse layer, which is little once in a hundred.
POSITIONS_PER_CONNECTION = 128


def candidates_field() -> Any:
    """The declaration of ``candidates``, for methods that grow by gradients."""
    return parameter(
        default="auto",
        low=1,
        help="where gradients are looked at: None for all positions, exactly; a number for so many "
        'random dormant ones per layer, and what is dropped; "auto" is exact where affordable '
        "(rewire.methods.criteria.gradients.sampled)",
    )


def check_candidates(candidates: CandidateCount) -> None:
    """Raise ValueError saying what is allowed if ``candidates`` is not."""
    check("candidates", candidates, CandidateCount, low=1)


def sampled(pool: Pool, candidates: CandidateCount) -> int | None:
    """How many candidates to draw; None for exact gradients of all positions.

    "auto" is exact where the weight has at most 2**20 (allowed) positions or 128 for each
    connection, and no compiled graph has used it; else as many candidates as there are connections.
    """
    weight = pool.weight
    if candidates is None:
        return None
    if candidates == "auto":
        affordable = weight.positions <= max(SMALL, POSITIONS_PER_CONNECTION * weight.connections)
        if affordable and not weight.traced:
            return None
        candidates = weight.connections
    return min(int(candidates), weight.dormant)


def request(pool: Pool, candidates: CandidateCount, seed: int, step: int) -> None:
    """Prepare the pool for `best` after the next step; what an earlier request collected is
    discarded.

    Candidates are drawn by (seed, step), so that a resumed run asks for the same.
    """
    weight = pool.weight
    count = sampled(pool, candidates)
    if count is None:
        pool.watch()
        return
    if not count:  # nothing is dormant; what will be dropped is
        rows = cols = torch.empty(0, dtype=torch.int64, device=weight.device)
    else:
        none = torch.empty(0, dtype=torch.int64, device=weight.device)
        rows, cols = uniform(pool, none, count, seed, step, Purpose.CANDIDATES)
    pool.unwatch()
    weight.candidates = Candidates(weight, rows, cols)
    pool.watch()


def status(pool: Pool) -> Status:
    """What the step gave of what was asked for, on all ranks."""
    record = pool.recorder.record if pool.recorder is not None else None
    return Status.NOTHING if record is None else record.agree()


def waits(pool: Pool) -> bool:
    """Whether the pool must do without gradients now: it took no part in the step, or has been
    compiled since the request was made (a compiled graph cannot be captured; with "auto" the next
    request will be for candidates).
    """
    found = status(pool)
    return found is Status.NOTHING or (found is Status.UNKNOWN and pool.weight.traced)


def probed(pool: Pool) -> tuple[Tensor, Tensor]:
    """Of the step: the gradients of the weight's slots, (capacity,), and of the candidates, (n,),
    over all ranks.
    """
    weight, candidates = pool.weight, pool.weight.candidates
    assert candidates is not None
    own = recorded(pool).probed
    both = torch.zeros_like(candidates.probe, requires_grad=False) if own is None else own.clone()
    both = sum_over_ranks(weight, both)
    return both[: both.numel() - candidates.count], both[both.numel() - candidates.count :]


def best(pool: Pool, dropped: Tensor, count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """``count`` positions of the largest gradient magnitudes that are dormant once the slots
    ``dropped`` are gone.

    Among all positions, or among the candidates and what is dropped (uniformly random ones are
    added where these are too few). int64, in (row, col) order; ties go to the lowest position.
    RuntimeError if nothing was requested.
    """
    weight = pool.weight
    if weight.candidates is None:
        scores, room = Gradients(pool), weight.dormant + dropped.numel()
        many = count if weight.limits is None else min(RANKED * count, room)
        rows, cols, found = top(scores.block, pool, dropped, many, at=scores.at, absolute=True)
        if weight.limits is None:
            return rows, cols
        order = torch.sort(found, descending=True, stable=True).indices.to(rows.device)
        return fitting(pool, dropped, (rows[order], cols[order]), count, seed, step)
    own, new = probed(pool)
    return best_candidates(pool, dropped, torch.cat([own[dropped], new]), count, seed, step)


def best_candidates(
    pool: Pool, dropped: Tensor, scores: Tensor, count: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """As `best`, by ``scores`` of the dropped connections and then of the candidates."""
    weight = pool.weight
    assert weight.candidates is not None
    n_cols = weight.matrix_shape[1]
    keys = torch.cat([pool.keys(dropped), weight.candidates.rows * n_cols + weight.candidates.cols])
    keys, order = torch.sort(keys)
    if weight.limits is not None:
        best = torch.sort(
            torch.nan_to_num(scores[order].abs(), nan=0.0), descending=True, stable=True
        ).indices
        return fitting(
            pool, dropped, (keys[best] // n_cols, keys[best] % n_cols), count, seed, step
        )
    chosen = strongest(keys, scores[order].abs(), count)
    return fill(pool, dropped, chosen, count, seed, step)


def strongest(keys: Tensor, scores: Tensor, count: int) -> Tensor:
    """The ``count`` keys (or all there are) with the largest scores; ``keys`` ascend, and so does
    the result.
    """
    collector = Best(count)
    collector.add(keys, torch.nan_to_num(scores, nan=0.0))
    return collector.result()[0].to(keys.device)


def fill(
    pool: Pool, dropped: Tensor, keys: Tensor, count: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """The positions of ``keys`` and, up to ``count``, uniformly random others; rows and cols in
    (row, col) order.
    """
    n_cols = pool.weight.matrix_shape[1]
    if keys.numel() < count:
        # at most keys.numel() of them are known already
        rows, cols = random_dormant(pool, dropped, count, seed, step)
        others = rows * n_cols + cols
        others = others[~torch.isin(others, keys)]
        # They come sorted: an even spread over them, not the first rows only.
        places = (
            torch.arange(count - keys.numel(), device=keys.device)
            * others.numel()
            // (count - keys.numel())
        )
        keys = torch.sort(torch.cat([keys, others[places]])).values
    return keys // n_cols, keys % n_cols

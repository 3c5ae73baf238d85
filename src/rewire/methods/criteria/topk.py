"""The best of all dormant connections, found in tiles of rows with a running top-k: never rows x
cols.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rewire import ops, topology
from rewire.distributed import sum_over_ranks
from rewire.methods.core.base import Pool
from rewire.methods.core.recording import Record, Status

__all__ = ["Best", "Gradients", "exponential", "gradient_block", "recorded", "top"]

#: Elements of a tile of scores.
TILE_ELEMENTS = 1 << 20

#: The first tile has so many elements for each that is wanted, if that is less; then they double.
FIRST = 4
#: Positions that tell beforehand about where the bar will be.
SAMPLE = 1 << 15

#: ``(start, stop) -> (stop - start, cols)``: scores of the matrix rows from start to stop; higher
#: is better.
ScoreBlock = Callable[[int, int], Tensor]
#: ``(rows, cols) -> (n,)``: scores of distinct positions (int64, (n,) each).
ScoreAt = Callable[[Tensor, Tensor], Tensor]


class Best:
    """The ``count`` largest of a stream of scores whose keys ascend; among equals those that came
    first.

    O(count + the longest piece) memory. A piece costs one comparison per score, and cutting costs
    O(count) for each ``count`` scores that made it, so the order of the stream matters little.

    Attributes:
        bar: only scores above it can still make it (at first as given: those below are left out).
    """

    def __init__(self, count: int, bar: float = -math.inf) -> None:
        self.count = count
        self.bar = bar
        self._keys: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._held = 0

    def add(self, keys: Tensor, scores: Tensor) -> None:
        """1-D ``scores`` of ``keys`` (int64). -inf and NaN are never taken."""
        at = (scores > self.bar).nonzero().flatten()
        self.extend(keys[at], scores[at])

    def extend(self, keys: Tensor, scores: Tensor) -> None:
        """As `add`, of scores that are above the bar."""
        if not self.count or not keys.numel():
            return
        self._keys.append(keys)
        self._scores.append(scores)
        self._held += keys.numel()
        if self._held > 2 * self.count:
            self._cut()

    def _cut(self) -> None:
        keys, scores = torch.cat(self._keys), torch.cat(self._scores)
        if keys.numel() > self.count:
            keep = ops.extremes(scores, self.count, largest=True)
            keys, scores = keys[keep], scores[keep]
        if keys.numel() == self.count:
            # Later scores have higher keys, so they must be above the lowest; at it they come too
            # late.
            self.bar = float(scores.min())
        self._keys, self._scores, self._held = [keys], [scores], keys.numel()

    def result(self) -> tuple[Tensor, Tensor]:
        """Keys (int64, ascending) and their scores; fewer than ``count`` if there were not as
        many.
        """
        if not self._held:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        self._cut()
        return self._keys[0], self._scores[0]


def top(
    score_block: ScoreBlock,
    pool: Pool,
    dropped: Tensor,
    count: int,
    *,
    at: ScoreAt | None = None,
    absolute: bool = False,
    draw: ops.Draw | None = None,
    tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` positions with the highest scores among those that are dormant once ``dropped``
    are gone.

    Args:
        score_block: scores of whole rows, see `ScoreBlock`; NaN counts as the lowest.
        dropped: slots, int64; their positions are candidates like any other.
        at: scores of single positions, see `ScoreAt`: a sample of them tells beforehand about where
            the bar will be, so that little has to be sorted out. It changes the result in nothing.
        absolute: the magnitude of scores counts.
        draw: the magnitude (``draw.least`` at least, also of NaN) over `exponential` of the
            position counts.
        tile: elements of a tile, at least one row; 2**20 by default.

    Returns rows, cols (int64, in (row, col) order) and what counted. Among equals the lowest
    position wins, so the result depends neither on slots nor on tiles. Raises ValueError where
    fewer than ``count`` are dormant. Cost: O(M) time beside ``score_block``'s, O(tile + count +
    capacity) memory.
    """
    weight = pool.weight
    n_rows, n_cols = weight.matrix_shape
    free = weight.dormant + dropped.numel()
    if not 0 <= count <= free:
        raise ValueError(f"{pool.name} cannot grow {count} connections: {free} are dormant")
    if pool.allowed is not None:
        return _of_allowed(at or _from_blocks(score_block), pool, dropped, count, absolute, draw)
    kept = torch.ones(weight.capacity, dtype=torch.bool, device=weight.device)
    kept[dropped] = False
    most = max(1, (tile or TILE_ELEMENTS) // n_cols)

    def search(bar: float) -> Best:
        """The best of all that are above ``bar``."""
        best = Best(count, bar)
        # Where there is no bar nothing can be passed over at first, so begin with not much more
        # than is wanted.
        step = most if bar > -math.inf else min(most, max(1, FIRST * count // n_cols))
        start, stop = 0, 0 if count else n_rows
        while stop < n_rows:
            start, stop = stop, min(stop + step, n_rows)
            step = min(most, 2 * step)
            scores = score_block(start, stop)
            if draw is None:
                best.extend(
                    *ops.above(scores, start, weight.index, kept, best.bar, absolute=absolute)
                )
            else:
                keys, found, uniforms = ops.above_drawn(
                    scores, start, weight.index, kept, best.bar, draw
                )
                best.add(keys, found.div_(exponential(uniforms)))
        return best

    bar = -math.inf if at is None else _guess(at, pool, count / max(free, 1), absolute, draw)
    keys, found = search(bar).result()
    if keys.numel() < count:  # the sample misled
        keys, found = search(-math.inf).result()
    keys = keys.to(weight.device)
    rows = keys.div(n_cols, rounding_mode="trunc")
    return rows, keys - rows * n_cols, found.to(weight.device)


def _of_allowed(
    at: ScoreAt, pool: Pool, dropped: Tensor, count: int, absolute: bool, draw: ops.Draw | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `top`, where only some positions are allowed: all of them are scored. O(allowed) memory,
    and time beside ``at``'s.
    """
    weight, n_cols = pool.weight, pool.weight.matrix_shape[1]
    assert pool.allowed is not None
    keys = topology.dormant_keys(pool.allowed, weight.index, n_cols, pool.keys(dropped))
    scores = _counted(at(keys // n_cols, keys % n_cols), keys, absolute, draw)
    scores = torch.nan_to_num(scores, nan=-math.inf)
    best = torch.sort(scores, descending=True, stable=True).indices[:count].to(keys.device)
    best = torch.sort(best).values
    return keys[best] // n_cols, keys[best] % n_cols, scores[best]


def _from_blocks(score_block: ScoreBlock) -> ScoreAt:
    """Scores of single positions, in (row, col) order, from those of whole rows, a row at a
    time.
    """

    def at(rows: Tensor, cols: Tensor) -> Tensor:
        found, counts = (t.tolist() for t in torch.unique_consecutive(rows, return_counts=True))
        within = zip(found, cols.split(counts), strict=True)
        parts = [score_block(row, row + 1)[0, own] for row, own in within]
        return torch.cat(parts) if parts else torch.empty(0, device=rows.device)

    return at


def _counted(scores: Tensor, keys: Tensor, absolute: bool, draw: ops.Draw | None) -> Tensor:
    """What counts of the ``scores`` at ``keys``, see `top`."""
    if draw is None:
        return scores.abs() if absolute else scores
    scores = torch.nan_to_num(scores.abs(), nan=0.0).clamp_(min=draw.least)
    return scores.div_(exponential(ops.uniforms(draw, keys)))


def _guess(at: ScoreAt, pool: Pool, share: float, absolute: bool, draw: ops.Draw | None) -> float:
    """A number that nearly always somewhat more than ``share`` of the dormant positions score
    above, by a sample.

    -inf where a sample would not help. It is the same on all ranks.
    """
    weight = pool.weight
    dormant, n_cols = weight.size - weight.connections, weight.matrix_shape[1]
    # Hits in the sample vary by their square root.
    hits = math.ceil(SAMPLE * share + 4 * math.sqrt(SAMPLE * share)) + 8
    if dormant < 16 * SAMPLE or hits > SAMPLE // 2:
        return -math.inf
    # One in each of as many ranges of equal length.
    each = dormant // SAMPLE
    offsets = torch.randint(0, each, (SAMPLE,), generator=torch.Generator().manual_seed(0))
    ranks = (torch.arange(SAMPLE) * each + offsets).to(weight.device)
    rows, cols = topology.candidates(
        weight.index, *weight.matrix_shape, ranks, ranks[:0], ranks[:0]
    )
    scores = _counted(at(rows, cols), rows * n_cols + cols, absolute, draw)
    bar = scores[ops.extremes(scores, hits, largest=True)].min()
    # Whatever equals it is still above what is returned.
    return (
        float(torch.nextafter(bar, torch.full_like(bar, -torch.inf)))
        if bool(bar.isfinite())
        else -math.inf
    )


def exponential(uniforms: Tensor) -> Tensor:
    """Standard exponential numbers from uniform ones in (0, 1]: float32. Small ones decide, and
    keep all their bits.
    """
    return -torch.log1p(-uniforms)


class Gradients:
    """The gradients of a pool's positions, dormant ones included: summed over all recorded calls of
    the step, and over ranks where the pool is shared. Raises RuntimeError where they are not known.

    They are as backward gave them; `Record.scale` brings them to the optimizer's scale.
    """

    def __init__(self, pool: Pool) -> None:
        self._weight, self._pairs = pool.weight, recorded(pool).pairs

    def block(self, start: int, stop: int) -> Tensor:
        """Of whole rows: (stop - start, cols)."""
        return self._total(
            [pair.block(start, stop) for pair in self._pairs],
            stop - start,
            self._weight.matrix_shape[1],
        )

    def at(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Of distinct positions: (n,)."""
        index = topology.build_index(rows, cols, *self._weight.matrix_shape)
        return self._total([pair.at(index, rows.numel()) for pair in self._pairs], rows.numel())

    def _total(self, parts: Sequence[Tensor], *shape: int) -> Tensor:
        if not parts:  # the layer did not run, here or at all
            kind = torch.promote_types(self._weight.dtype, torch.float32)
            return sum_over_ranks(
                self._weight, torch.zeros(shape, dtype=kind, device=self._weight.device)
            )
        total = parts[0]
        for part in parts[1:]:
            total += part
        return sum_over_ranks(self._weight, total)


def gradient_block(pool: Pool) -> ScoreBlock:
    """`Gradients.block` of the pool."""
    return Gradients(pool).block


def recorded(pool: Pool) -> Record:
    """What was recorded of the pool's step. Raises RuntimeError where that is not all of its
    gradient.
    """
    record = pool.recorder.record if pool.recorder is not None else None
    status = Status.UNKNOWN if record is None else record.agree()
    if record is None or status is Status.UNKNOWN:
        raise RuntimeError(
            f"the gradients of {pool.name}, which the method needs, were not captured: a compiled "
            "layer cannot be captured, so give the method candidates=... (a number) there, which "
            "works in compiled models; gradients put into .grad by hand, or computed before the "
            "method was made, are not known at dormant positions"
        )
    if status is Status.PARTIAL:
        raise RuntimeError(
            f"the gradients of {pool.name} that the optimizer used are not all of backward passes "
            "since the method's last step: call zero_grad() after each optimizer step"
        )
    return record

"""The best of all dormant connections, found in tiles of rows with a running top-k: never rows x cols."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rewire import ops
from rewire.distributed import sum_over_ranks
from rewire.methods.base import Pool

__all__ = ["Best", "gradient_block", "top"]

#: Elements of a tile of scores.
TILE_ELEMENTS = 1 << 20

#: ``(start, stop) -> (stop - start, cols)``: scores of the matrix rows from start to stop; higher is better. They may
#: be overwritten.
ScoreBlock = Callable[[int, int], Tensor]


class Best:
    """The ``count`` largest of a stream of scores whose keys ascend; among equals those that came first.

    O(count + the longest piece) memory. A piece costs one comparison per score, and sorting out costs O(count) for
    each ``count`` scores that made it, so the order of the stream matters little.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._scores: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._held = 0
        self._bar: Tensor | None = None

    def add(self, scores: Tensor, keys: Tensor | None = None, first: int = 0) -> None:
        """1-D ``scores`` of ``keys`` (int64; else first, first + 1, ...). -inf is never taken."""
        if self._bar is not None:
            worthy = scores > self._bar
        elif 0 < self.count < scores.numel() and not self._held:
            # So many of these are at the bar or above, so whatever comes later must be above it.
            bar = scores.kthvalue(scores.numel() - self.count + 1).values
            worthy = (scores >= bar) & (scores > -torch.inf)
            self._bar = bar if bool(bar > -torch.inf) else None
        else:
            worthy = scores > -torch.inf
        at = worthy.nonzero().flatten()
        if self.count and at.numel():
            self._scores.append(scores[at])
            self._keys.append(at + first if keys is None else keys[at])
            self._held += at.numel()
        if self._held > 2 * self.count:
            self._sort_out()

    def _sort_out(self) -> None:
        scores, keys = torch.cat(self._scores), torch.cat(self._keys)
        if scores.numel() > self.count:
            bar = scores.kthvalue(scores.numel() - self.count + 1).values
            keep = scores >= bar
            if int(keep.sum()) > self.count:  # ties at the bar: the first stay
                above, level = scores > bar, scores == bar
                keep = above | (level & (level.cumsum(0) <= self.count - above.sum()))
            # Later scores have higher keys, so they must be above the bar; at the bar they come too late.
            scores, keys, self._bar = scores[keep], keys[keep], bar
        self._scores, self._keys, self._held = [scores], [keys], scores.numel()

    def result(self) -> tuple[Tensor, Tensor]:
        """Keys (int64, ascending) and their scores; fewer than ``count`` if there were not as many."""
        if not self._held:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        self._sort_out()
        return self._keys[0], self._scores[0]


def top(
    score_block: ScoreBlock, pool: Pool, dropped: Tensor, count: int, *, tile: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` positions with the highest scores among those that are dormant once ``dropped`` are gone.

    Args:
        score_block: scores of whole rows, see `ScoreBlock`; NaN counts as the lowest.
        dropped: slots, int64; their positions are candidates like any other.
        tile: elements of a tile, at least one row; 2**20 by default.

    Returns rows, cols (int64, in (row, col) order) and scores. Among equal scores the lowest position wins, so the
    result depends neither on slots nor on tiles. Raises ValueError where fewer than ``count`` are dormant.
    Cost: O(M) time beside ``score_block``'s, O(tile + count + capacity) memory.
    """
    weight = pool.weight
    n_rows, n_cols = weight.matrix_shape
    free = weight.size - weight.connections + dropped.numel()
    if not 0 <= count <= free:
        raise ValueError(f"{pool.name} cannot grow {count} connections: {free} are dormant")
    kept = torch.ones(weight.capacity, dtype=torch.bool, device=weight.device)
    kept[dropped] = False
    index = weight.index
    step = max(1, (tile or TILE_ELEMENTS) // n_cols)
    best = Best(count)
    for start in range(0, n_rows if count else 0, step):
        stop = min(start + step, n_rows)
        scores = score_block(start, stop)
        lowest = torch.finfo(scores.dtype).min
        scores = torch.nan_to_num(scores, nan=lowest, posinf=torch.inf, neginf=lowest)
        ptr = index.row_ptr[start : stop + 1].long()
        low, high = int(ptr[0].item()), int(ptr[-1].item())
        row = torch.repeat_interleave(torch.arange(stop - start, device=ptr.device), ptr.diff())
        stays = kept[index.row_slots[low:high].long()]
        scores[row[stays], index.row_cols[low:high].long()[stays]] = -torch.inf
        best.add(scores.flatten(), first=start * n_cols)
    keys, found = best.result()
    keys, found = keys.to(weight.device), found.to(weight.device)
    return keys // n_cols, keys % n_cols, found


def gradient_block(pool: Pool) -> ScoreBlock:
    """The gradients of whole rows, dormant positions included: summed over all captured calls of the step, and over
    ranks where the pool is shared. Raises RuntimeError where nothing was captured."""
    pairs = captured(pool)

    def block(start: int, stop: int) -> Tensor:
        total = pairs[0].block(start, stop)
        for pair in pairs[1:]:
            total += pair.block(start, stop)
        return sum_over_ranks(pool.weight, total)

    return block


def captured(pool: Pool) -> list[ops.Pair]:
    """What the pool's layer kept of the step. Raises RuntimeError where that is nothing."""
    if not pool.weight.capture:
        raise RuntimeError(
            f"nothing was captured of {pool.name}, whose gradients the method needs: a compiled layer cannot be "
            "captured, so give the method candidates=... (a number) there, which works in compiled models"
        )
    return pool.weight.capture

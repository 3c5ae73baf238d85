"""Random connections: a first topology, and dormant positions to grow.

Functions take the positions that are ``allowed`` (a sorted list), or None for all of them. The
plain PyTorch code is the definition and runs on any device. Where all are allowed it calls the
native functions ``torch.ops.rewire.sample_dormant``, ``sample_dormant_in_rows`` and
``candidates`` on the CPU (and ``distinct``, by `rewire.random.distinct`), with bit-identical
results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewire import _native, random
from rewire.topology.index import Index, TopologyError, build_index
from rewire.topology.prior import Positions, dormant_keys

__all__ = [
    "INITIAL",
    "candidates",
    "sample",
    "sample_dormant",
    "sample_dormant_in_rows",
    "sample_in_rows",
]

#: Stream of the first topology. Methods take streams of their own (`rewire.methods.core.base`).
INITIAL = 0
#: Positions for each one drawn up to which all of them are listed.
_MANY = 16


def sample(
    n_rows: int,
    n_cols: int,
    connections: int,
    seed: int,
    *,
    allowed: Positions | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A uniformly random topology with exactly ``connections`` connections, sorted by (row, col);
    int64.

    Drawn without replacement, so the number is exact. (DEEP R's authors draw with replacement and
    start below K.) O(K) memory.

    Args:
        start: keys (row * cols + col; int64, ascending, allowed) of connections that it has in any
            case; the others are random.
    """
    total = n_rows * n_cols if allowed is None else allowed.keys.numel()
    least = 0 if start is None else start.numel()
    if not least <= connections <= total:
        what = "" if allowed is None else f", of which {total} positions are allowed"
        raise TopologyError(
            f"{connections} connections do not fit a {n_rows} x {n_cols} matrix{what}: choose "
            f"between {least} and {total}"
        )
    if allowed is None and start is None:
        keys = random.distinct(connections, total, seed, 0, INITIAL)
    else:
        device = allowed.keys.device if allowed is not None else None
        known = torch.empty(0, dtype=torch.int64, device=device) if start is None else start
        none = known[:0]
        index = build_index(known // n_cols, known % n_cols, n_rows, n_cols)
        size = n_rows, n_cols, connections - known.numel()
        rows, cols = sample_dormant(index, *size, none, none, seed, 0, INITIAL, allowed)
        keys = torch.sort(torch.cat([known, rows * n_cols + cols])).values
    return keys // max(n_cols, 1), keys % max(n_cols, 1)


def sample_dormant(
    index: Index,
    n_rows: int,
    n_cols: int,
    n: int,
    dropped_rows: Tensor,
    dropped_cols: Tensor,
    seed: int,
    step: int,
    stream: int,
    allowed: Positions | None = None,
) -> tuple[Tensor, Tensor]:
    """``n`` distinct positions, uniform over those that are dormant without ``dropped``; int64 rows
    and cols.

    The index still contains the d dropped connections (active, distinct). They are candidates like
    all dormant positions, so as many can always grow as were dropped. `rewire.random.distinct`
    draws a uniformly random subset of the ranks ``0 ... M - K + d - 1``, and `candidates` maps it
    to positions: exact at every density, without rejection. O(n (log rows + log fan-in)) time and
    O(n) memory (native). Of ``allowed`` positions, which M then counts, O(rows + n log fan-in log
    M). Raises `TopologyError` if fewer than n are dormant.
    """
    positions = n_rows * n_cols if allowed is None else allowed.keys.numel()
    free = positions - int(index.row_ptr[-1].item()) + dropped_rows.numel()
    if not 0 <= n <= free:
        raise TopologyError(
            f"cannot grow {n} connections where {free} are dormant: choose between 0 and {free}"
        )
    if allowed is None and _native.available() and index.row_ptr.device.type == "cpu":
        rows, cols = torch.ops.rewire.sample_dormant(
            index.row_ptr, index.row_cols, n_cols, n, dropped_rows, dropped_cols, seed, step, stream
        )
        return rows, cols
    ranks = random.distinct(n, free, seed, step, stream, device=index.row_ptr.device)
    return candidates(index, n_rows, n_cols, ranks, dropped_rows, dropped_cols, allowed)


def candidates(
    index: Index,
    n_rows: int,
    n_cols: int,
    ranks: Tensor,
    dropped_rows: Tensor,
    dropped_cols: Tensor,
    allowed: Positions | None = None,
) -> tuple[Tensor, Tensor]:
    """The positions of ranks: rank u < M - K is the u-th dormant position in (row, col) order, rank
    M - K + i the i-th dropped connection. int64 in and out.
    """
    if allowed is None and _native.available() and index.row_ptr.device.type == "cpu":
        rows, cols = torch.ops.rewire.candidates(
            index.row_ptr, index.row_cols, n_cols, ranks, dropped_rows, dropped_cols
        )
        return rows, cols
    ptr = index.row_ptr.long()
    if allowed is None:
        dormant_before = torch.arange(n_rows + 1, device=ptr.device) * n_cols - ptr
    else:
        dormant_before = allowed.row_ptr - ptr
    dormant = int(dormant_before[-1].item())
    again = ranks >= dormant
    if allowed is not None and _MANY * ranks.numel() > allowed.keys.numel():
        # Listing all that is dormant takes less time then.
        listed = dormant_keys(allowed, index, n_cols, ranks[:0])
        gone = dropped_rows.long() * n_cols + dropped_cols.long()
        keys = torch.cat([listed, gone])[ranks]
        return keys // n_cols, keys % n_cols
    # Full rows repeat a value of dormant_before; the last row with a value <= rank has room.
    row = torch.searchsorted(dormant_before, ranks.clamp(max=dormant - 1), right=True) - 1
    row = row.clamp(min=0)
    col = _nth_dormant_col(index, n_cols, row, ranks - dormant_before[row], allowed)
    taken = (ranks - dormant).clamp(min=0)[again]
    row[again], col[again] = dropped_rows.long()[taken], dropped_cols.long()[taken]
    return row, col


def _nth_dormant_col(
    index: Index, n_cols: int, row: Tensor, nth: Tensor, allowed: Positions | None
) -> Tensor:
    """Column of the ``nth`` dormant position of each ``row``.

    If the row's active columns are c_0 < c_1 < ..., the nth dormant column is nth + j, where j is
    the number of i with c_i - i <= nth. c_i - i never decreases, so a binary search finds j. Where
    only some columns of the row are ``allowed``, their numbers in the row count instead.
    """
    first = torch.zeros_like(row) if allowed is None else allowed.row_ptr[row]
    begin, end = index.row_ptr[row].long(), index.row_ptr[row + 1].long()
    low, high = torch.zeros_like(begin), end - begin
    longest = int(high.max().item()) if high.numel() else 0
    for _ in range(longest.bit_length()):
        middle = (low + high) // 2
        open_ = low < high
        at = (begin + middle).clamp(max=max(index.row_cols.numel() - 1, 0))
        place = index.row_cols[at].long()
        if allowed is not None:
            place = torch.searchsorted(allowed.keys, row * n_cols + place) - first
        before = open_ & (place - middle <= nth)
        low = torch.where(before, middle + 1, low)
        high = torch.where(open_ & ~before, middle, high)
    if allowed is None:
        return nth + low
    # Ranks of dropped connections, which `candidates` replaces, may lie behind the end.
    return allowed.keys[(first + nth + low).clamp(max=allowed.keys.numel() - 1)] - row * n_cols


def sample_dormant_in_rows(
    index: Index,
    n_rows: int,
    n_cols: int,
    dropped_rows: Tensor,
    dropped_cols: Tensor,
    seed: int,
    step: int,
    stream: int,
    allowed: Positions | None = None,
) -> Tensor:
    """A new column for every dropped connection in its own row, so that fan-ins stay; int64.

    ``dropped_rows`` (int64) is sorted ascending. In row r, with d_r dropped connections, the new
    columns are a uniformly random subset (`rewire.random.distinct` with ``offset = r << 32``) of
    ``cols - fan_in + d_r`` candidates: the dormant columns in ascending order, then the dropped
    ones in the order given.
    """
    if allowed is None and _native.available() and index.row_ptr.device.type == "cpu":
        drawn: Tensor = torch.ops.rewire.sample_dormant_in_rows(
            index.row_ptr, index.row_cols, n_cols, dropped_rows, dropped_cols, seed, step, stream
        )
        return drawn
    if not dropped_rows.numel():
        return dropped_cols.long().clone()
    unique, first, count = _runs(dropped_rows)
    fan_in = (index.row_ptr[1:] - index.row_ptr[:-1]).long()[unique]
    dormant = (n_cols if allowed is None else torch.diff(allowed.row_ptr)[unique]) - fan_in
    rank = torch.empty_like(dropped_rows)
    alone = count == 1
    rank[first[alone]] = random.below(
        seed, step, stream, unique[alone] << 32, (dormant + count)[alone]
    )
    for u, f, c, free in zip(
        *(t[~alone].tolist() for t in (unique, first, count, dormant + count)), strict=True
    ):
        rank[f : f + c] = random.distinct(
            c, free, seed, step, stream, offset=u << 32, device=rank.device
        )
    # In a row with one candidate, distinct() would draw no number, but below(..., 1) is 0 as well.
    run = torch.repeat_interleave(torch.arange(unique.numel(), device=rank.device), count)
    again = rank >= dormant[run]
    col = _nth_dormant_col(index, n_cols, dropped_rows, rank.clamp(min=0), allowed)
    origin = (first[run] + rank - dormant[run])[again]
    col[again] = dropped_cols.long()[origin]
    return col


def sample_in_rows(
    rows: Tensor,
    cols: Tensor,
    n_rows: int,
    n_cols: int,
    need: Tensor,
    seed: int,
    step: int,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """``need[r]`` uniformly random columns in every row r, distinct and not among ``rows, cols``.

    Args:
        rows, cols: positions that are taken; int64, (n,), in any order.
        need: int64, (n_rows,), at least 0.

    Returns rows (ascending) and columns, int64, sum(need) of each. Raises `TopologyError` if a row
    does not have so many columns left. O(n + sum(need) + n_rows + n_cols) time; on other devices
    than the CPU, with a loop over the rows that need several.
    """
    if need.shape != (n_rows,) or bool((need < 0).any()):
        raise TopologyError(
            f"need must have a number of at least 0 for each of the {n_rows} rows, not "
            f"{need.tolist()}"
        )
    index = build_index(rows, cols, n_rows, n_cols)
    free = n_cols - (index.row_ptr[1:] - index.row_ptr[:-1]).long()
    if bool((need > free).any()):
        row = int((need > free).nonzero()[0].item())
        raise TopologyError(
            f"row {row} has {int(free[row])} columns left, not {int(need[row])}: ask for fewer"
        )
    new = torch.repeat_interleave(torch.arange(n_rows, device=need.device), need)
    first = torch.cumsum(need, 0) - need
    # `sample_dormant_in_rows` draws for dropped connections. So take the first free columns, and
    # drop them: the draw then is among exactly the columns that were free.
    nth = torch.arange(new.numel(), device=need.device) - first[new]
    ahead = _nth_dormant_col(index, n_cols, new, nth, None)
    filled = build_index(torch.cat([rows, new]), torch.cat([cols, ahead]), n_rows, n_cols)
    return new, sample_dormant_in_rows(filled, n_rows, n_cols, new, ahead, seed, step, stream)


def _runs(sorted_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct values of a sorted tensor, where each begins, and how often it occurs."""
    value, count = torch.unique_consecutive(sorted_values, return_counts=True)
    return value, torch.cumsum(count, 0) - count, count

"""Topologies within limits on fan-in, fan-out and blocks (`rewire.budget.Limits`): drawing,
growing, checking.

Everything takes O(K + rows + cols + blocks) memory. A *family* is one kind of limit: it puts every
position in a group (its row, its column, its block) that has room for so many connections.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rewire import random
from rewire.budget import Limits
from rewire.topology import Index, TopologyError

__all__ = ["first_fitting", "grow", "sample", "violation"]

_NO_LIMIT = 2**62
# random numbers of a round, and those that put its candidates in order
_ROUNDS, _ORDER = 1 << 34, 1 << 60


class _Grid(NamedTuple):
    """A matrix cut into blocks; without a limit on blocks it is one."""

    rows: int
    cols: int
    height: int
    width: int
    limits: Limits

    @classmethod
    def of(cls, rows: int, cols: int, limits: Limits) -> _Grid:
        height, width, _ = limits.block or (rows, cols, 0)
        return cls(rows, cols, min(height, rows), min(width, cols), limits)

    @property
    def across(self) -> int:
        """Blocks in a band of rows."""
        return -(-self.cols // self.width)

    @property
    def down(self) -> int:
        """Blocks in a band of columns."""
        return -(-self.rows // self.height)

    def groups(self, rows: Tensor, cols: Tensor) -> list[Tensor]:
        """Group of every position in each family: row, column, block."""
        return [rows, cols, rows // self.height * self.across + cols // self.width]

    def room(self, rows: Tensor, cols: Tensor) -> list[Tensor]:
        """How many more connections each group can have beside those given, by family; int64."""
        limits = self.limits
        most = (limits.fan_in, limits.fan_out, limits.block[2] if limits.block else None)
        sizes = (self.rows, self.cols, self.down * self.across)
        return [
            (_NO_LIMIT if limit is None else limit) - torch.bincount(group, minlength=size)
            for limit, size, group in zip(most, sizes, self.groups(rows, cols), strict=True)
        ]


def violation(index: Index, n_rows: int, n_cols: int, limits: Limits) -> str | None:
    """What of ``limits`` the connections in ``index`` exceed, in words; None if nothing."""
    rows, cols = _positions(index)
    grid = _Grid.of(n_rows, n_cols, limits)
    for name, room in zip(("row", "column", "block"), grid.room(rows, cols), strict=True):
        worst = int(room.argmin()) if room.numel() else 0
        if room.numel() and int(room[worst]) < 0:
            return (
                f"{name} {worst} has {-int(room[worst])} connections more than "
                "allowed: the "
                f"limits are {limits}"
            )
    return None


def _positions(index: Index) -> tuple[Tensor, Tensor]:
    """Rows and columns of the connections in (row, col) order; int64."""
    fan_in = torch.diff(index.row_ptr).long()
    rows = torch.repeat_interleave(torch.arange(fan_in.numel(), device=fan_in.device), fan_in)
    return rows, index.row_cols[: rows.numel()].long()


def first_fitting(groups: list[Tensor], room: list[Tensor], count: int) -> Tensor:
    """Which candidates, taken in the order given, fit: those whose groups all have room beside
    those taken before.

    Exactly what a loop over the candidates would take, at most ``count``, but in a few passes over
    all of them: a candidate surely fits if it would even if all undecided ones before it did, and
    surely does not if those taken before it leave no room. Each pass decides at least the first
    undecided one. Returns places, ascending.
    """
    n = groups[0].numel()
    device = groups[0].device
    taken = torch.zeros(n, dtype=torch.bool, device=device)
    open_ = torch.ones(n, dtype=torch.bool, device=device)
    # Families in which no group can fill up decide nothing.
    families = []
    for group, free in zip(groups, room, strict=True):
        order = torch.sort(group, stable=True).indices
        first = torch.ones(n, dtype=torch.bool, device=device)
        first[1:] = group[order][1:] != group[order][:-1]
        begin = torch.cummax(torch.where(first, torch.arange(n, device=device), 0), 0).values
        if n and bool((torch.arange(n, device=device) - begin >= free[group[order]]).any()):
            families.append((order, begin, free[group[order]]))

    def before(flags: Tensor, order: Tensor, begin: Tensor) -> Tensor:
        """How many of ``flags`` are set before each candidate in its group (in sorted order)."""
        up_to = torch.cumsum(flags[order].long(), 0)
        exclusive = up_to - flags[order].long()
        return exclusive - exclusive[begin]

    while bool(open_.any()):
        sure, never = open_.clone(), torch.zeros_like(open_)
        for order, begin, free in families:
            settled, pending = before(taken, order, begin), before(open_, order, begin)
            sure[order] &= settled + pending < free
            never[order] |= settled >= free
        taken |= sure
        open_ &= ~(sure | never)
        decided = int(open_.long().argmax()) if bool(open_.any()) else n
        if int(taken[:decided].sum()) >= count:
            break
    return taken.nonzero().flatten()[:count]


def grow(
    index: Index,
    n_rows: int,
    n_cols: int,
    count: int,
    dropped_rows: Tensor,
    dropped_cols: Tensor,
    limits: Limits,
    seed: int,
    step: int,
    stream: int,
    preferred: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``count`` distinct dormant positions that fit ``limits`` once ``dropped`` are gone; int64
    rows and cols.

    Taken first are those of ``preferred`` (dormant or dropped positions, best first) that fit in
    their order, then positions drawn at random, each uniformly from those that still fit.
    Just-dropped positions are candidates like any other, so the connections that were there are
    always one way out: where the draw gets stuck, dropped positions complete it, and if they do not
    fit beside all that was chosen, the later half of that is taken back, and again. So ``count``
    positions are always found as long as no more grow than were dropped, or `TopologyError` is
    raised.

    Time and memory O(K + rows + cols + blocks), with a logarithm, in a few rounds.
    """
    grid = _Grid.of(n_rows, n_cols, limits)
    device = index.row_ptr.device
    rows, cols = _positions(index)
    keys = rows * n_cols + cols
    gone = dropped_rows.long() * n_cols + dropped_cols.long()
    stays = torch.ones(keys.numel(), dtype=torch.bool, device=device)
    stays[torch.searchsorted(keys, gone)] = False
    kept = keys[stays]
    room = grid.room(kept // n_cols, kept % n_cols)
    chosen = kept.new_empty(0)
    if preferred is not None and count:
        chosen = _take(
            grid, preferred[0].long() * n_cols + preferred[1].long(), kept, chosen, room, count
        )
    wasted = 0
    for attempt in range(64):
        need = count - chosen.numel()
        if not need:
            return chosen // n_cols, chosen % n_cols
        found, everything = _draw(grid, room, need << wasted, seed, step, stream, attempt, device)
        more = _take(grid, found, kept, chosen, room, count)
        wasted = 0 if more.numel() > chosen.numel() else wasted + 1
        chosen = more
        if everything:
            break
    order = random.bits(seed, step, stream, _ORDER - 1 - torch.arange(gone.numel(), device=device))
    gone = gone[torch.sort(order).indices]
    while chosen.numel() < count:
        room = grid.room(
            *(
                torch.cat([kept, chosen]).div(n_cols, rounding_mode="floor"),
                torch.cat([kept, chosen]) % n_cols,
            )
        )
        whole = _take(grid, gone, kept, chosen, room, count)
        if whole.numel() < count and not chosen.numel():
            raise TopologyError(
                f"cannot grow {count} connections where {gone.numel()} are dropped and "
                f"{kept.numel()} stay, "
                f"within {limits}"
            )
        chosen = whole if whole.numel() == count else chosen[: chosen.numel() // 2]
    return chosen // n_cols, chosen % n_cols


def _take(
    grid: _Grid, keys: Tensor, kept: Tensor, chosen: Tensor, room: list[Tensor], count: int
) -> Tensor:
    """``chosen`` and the first of ``keys`` that are free and fit, ``count`` at most; ``room`` is
    brought up to date.

    ``kept`` is sorted.
    """
    if kept.numel():
        keys = keys[kept[torch.searchsorted(kept, keys).clamp_(max=kept.numel() - 1)] != keys]
    if chosen.numel():
        keys = keys[~torch.isin(keys, chosen)]
    groups = grid.groups(keys // grid.cols, keys % grid.cols)
    taken = first_fitting(groups, room, count - chosen.numel())
    for group, free in zip(groups, room, strict=True):
        free -= torch.bincount(group[taken], minlength=free.numel())
    return torch.cat([chosen, keys[taken]])


def _draw(
    grid: _Grid,
    room: list[Tensor],
    need: int,
    seed: int,
    step: int,
    stream: int,
    attempt: int,
    device: torch.device,
) -> tuple[Tensor, bool]:
    """Positions (as row * cols + col) in random order from where rows, columns and blocks have
    room, and whether they are all of those.
    """
    open_rows, open_cols, open_blocks = ((free > 0).nonzero().flatten() for free in room)
    in_row_band = torch.bincount(open_rows // grid.height, minlength=grid.down)
    in_col_band = torch.bincount(open_cols // grid.width, minlength=grid.across)
    row_begin, col_begin = in_row_band.cumsum(0) - in_row_band, in_col_band.cumsum(0) - in_col_band
    down, across = open_blocks // grid.across, open_blocks % grid.across
    sizes = in_row_band[down] * in_col_band[across]
    ends = sizes.cumsum(0)
    total = int(ends[-1]) if ends.numel() else 0
    everything = total <= 4 * need + 64
    offset = attempt * _ROUNDS
    if everything:
        ranks = torch.arange(total, device=device)
    else:
        ranks = random.distinct(
            2 * need + 16, total, seed, step, stream, offset=offset, device=device
        )
    shuffle = random.bits(
        seed, step, stream, _ORDER + offset + torch.arange(ranks.numel(), device=device)
    )
    ranks = ranks[torch.sort(shuffle, stable=True).indices]
    block = torch.searchsorted(ends, ranks, right=True)
    inside = ranks - (ends - sizes)[block]
    wide = in_col_band[across[block]]
    row = open_rows[row_begin[down[block]] + inside // wide] if ranks.numel() else ranks
    col = open_cols[col_begin[across[block]] + inside % wide] if ranks.numel() else ranks
    return row * grid.cols + col, everything


# --- the first topology ---------------------------------------------------------------------------

#: Stream of the first topology, as in `rewire.topology.sample`.
_INITIAL = 0
_MIX = 6


def sample(
    n_rows: int, n_cols: int, connections: int, limits: Limits, seed: int
) -> tuple[Tensor, Tensor]:
    """A random topology with exactly ``connections`` connections within ``limits``, sorted by (row,
    col); int64.

    Positions are drawn one after the other, uniformly from those that still fit. Close to the
    maximum that gets stuck; then connections are dealt out evenly over blocks, rows and columns
    (which works up to the maximum itself), with rows and columns permuted at random, and mixed by
    exchanges that keep every count. Raises ValueError above the maximum, with the limits.
    """
    limits.check(n_rows, n_cols, connections)
    keys = _greedy(n_rows, n_cols, connections, limits, seed)
    if keys.numel() < connections:
        keys = _mixed(n_cols, *_dealt(n_rows, n_cols, connections, limits, seed), limits, seed)
    keys = torch.sort(keys).values
    return keys // n_cols, keys % n_cols


def _greedy(n_rows: int, n_cols: int, connections: int, limits: Limits, seed: int) -> Tensor:
    grid = _Grid.of(n_rows, n_cols, limits)
    chosen = torch.empty(0, dtype=torch.int64)
    room = grid.room(chosen, chosen)
    kept, wasted = chosen, 0
    for attempt in range(12):
        need = connections - chosen.numel()
        if not need or wasted > 2:
            break
        found, everything = _draw(grid, room, need, seed, 0, _INITIAL, attempt, chosen.device)
        more = _take(grid, found, kept, chosen, room, connections)
        wasted = wasted + 1 if more.numel() == chosen.numel() else 0
        chosen = more
        if everything:
            break
    return chosen


def _dealt(
    n_rows: int, n_cols: int, connections: int, limits: Limits, seed: int
) -> tuple[Tensor, Tensor]:
    """Connections dealt out evenly: the counts of blocks of a kind differ by at most 1, and so do
    those of rows and columns of a band.
    """
    grid = _Grid.of(n_rows, n_cols, limits)
    counts = _block_counts(grid, connections)
    counts = counts[_permuted(grid.down, n_rows % grid.height, seed, 1)][
        :, _permuted(grid.across, n_cols % grid.width, seed, 2)
    ]
    heights = torch.full((grid.down,), grid.height)
    widths = torch.full((grid.across,), grid.width)
    heights[-1], widths[-1] = (
        n_rows - (grid.down - 1) * grid.height,
        n_cols - (grid.across - 1) * grid.width,
    )
    flat = counts.flatten()
    block = torch.repeat_interleave(torch.arange(flat.numel()), flat)
    t = torch.arange(block.numel()) - (flat.cumsum(0) - flat)[block]
    down, across = block // grid.across, block % grid.across
    h, w = heights[down], widths[across]
    # Rows of a band go on where the block before ended, and columns where the block above did.
    row_start = (counts.cumsum(1) - counts).flatten()[block]
    col_start = (counts.cumsum(0) - counts).flatten()[block]
    cycle = h * w // torch.gcd(h, w)  # so many steps along a diagonal, then one aside
    aside = (flat[block] // cycle) - t // cycle
    row = (row_start + t) % h + down * grid.height
    col = (col_start + t + aside) % w + across * grid.width
    return _shuffled(row, n_rows, grid.height, seed, 3), _shuffled(col, n_cols, grid.width, seed, 4)


def _block_counts(grid: _Grid, connections: int) -> Tensor:
    """Connections of every block (down x across), evenly: full blocks alike up to 1, and so on at
    the ends.
    """
    limits = grid.limits
    fan_in = min(limits.fan_in or grid.cols, grid.cols)
    fan_out = min(limits.fan_out or grid.rows, grid.rows)
    count = limits.block[2] if limits.block else grid.rows * grid.cols
    rows = [
        (grid.rows // grid.height, grid.height),
        (int(grid.rows % grid.height > 0), grid.rows % grid.height),
    ]
    cols = [
        (grid.cols // grid.width, grid.width),
        (int(grid.cols % grid.width > 0), grid.cols % grid.width),
    ]
    supply = [n * h * fan_in for n, h in rows]
    demand = [n * w * fan_out for n, w in cols]
    most = [[n * m * min(count, h * w) for m, w in cols] for n, h in rows]
    flow = _flow(supply, demand, most, connections)
    counts = torch.zeros(grid.down, grid.across, dtype=torch.int64)
    row_at, col_at = [0, rows[0][0]], [0, cols[0][0]]
    for i, (n, _) in enumerate(rows):
        for j, (m, _) in enumerate(cols):
            if n and m:
                # Remainders go on where those of the neighbouring kind ended, so that sums stay
                # even too.
                start_row = flow[i][0] % n if j else 0
                start_col = flow[0][j] % m if i else 0
                even = _even(n, m, flow[i][j], start_row, start_col)
                counts[row_at[i] : row_at[i] + n, col_at[j] : col_at[j] + m] = even
    return counts


def _even(n: int, m: int, total: int, start_row: int, start_col: int) -> Tensor:
    """``total`` dealt out over n x m cells: cells, sums of rows and of columns each differ by at
    most 1.
    """
    base, rest = divmod(total, n * m)
    cells = torch.full((n, m), base, dtype=torch.int64)
    t = torch.arange(rest)
    cycle = math.lcm(n, m)
    cells[(start_row + t) % n, (start_col + t + rest // cycle - t // cycle) % m] += 1
    return cells


def _flow(
    supply: list[int], demand: list[int], most: list[list[int]], total: int
) -> list[list[int]]:
    """A 2 x 2 integer flow of ``total``, within the capacities, found by augmenting paths."""
    flow = [[0, 0], [0, 0]]
    left, wanted = list(supply), list(demand)
    sent = 0
    while sent < total:
        # Straight: one edge. Around: i -> j, back along (k, j), k -> l.
        paths: list[tuple[int, list[tuple[int, int, int]], int, int]] = []
        for i in range(2):
            for j in range(2):
                paths.append((min(left[i], wanted[j], most[i][j] - flow[i][j]), [(i, j, 1)], i, j))
                k, m = 1 - i, 1 - j
                around = min(
                    left[i], wanted[m], most[i][j] - flow[i][j], flow[k][j], most[k][m] - flow[k][m]
                )
                paths.append((around, [(i, j, 1), (k, j, -1), (k, m, 1)], i, m))
        amount, path, source, sink = max(paths, key=lambda p: (p[0] > 0, -len(p[1]), p[0]))
        amount = min(amount, total - sent)
        if amount <= 0:
            raise AssertionError("Limits.check lets nothing through that does not fit")
        for i, j, sign in path:
            flow[i][j] += sign * amount
        left[source] -= amount
        wanted[sink] -= amount
        sent += amount
    return flow


def _random_order(n: int, seed: int, what: int) -> Tensor:
    keys = random.bits(seed, 1, _INITIAL, (what << 40) + torch.arange(n))
    return torch.sort(keys, stable=True).indices


def _permuted(n: int, ragged: int, seed: int, what: int) -> Tensor:
    """A random order of n bands; a last one of another size stays last."""
    order = _random_order(n - 1 if ragged else n, seed, what)
    return torch.cat([order, torch.tensor([n - 1])]) if ragged else order


def _shuffled(places: Tensor, n: int, band: int, seed: int, what: int) -> Tensor:
    """Rename rows (or columns) at random within their bands."""
    order = _random_order(n, seed, what)
    order = order[torch.sort(order // band, stable=True).indices]
    return order[places]


def _mixed(n_cols: int, rows: Tensor, cols: Tensor, limits: Limits, seed: int) -> Tensor:
    """Exchange the columns of random pairs of connections, which keeps every fan-in and fan-out;
    pairs are from one band of rows or of columns, which keeps the counts of blocks.
    """
    keys = rows * n_cols + cols
    height, width, _ = limits.block or (int(rows.max()) + 1 if rows.numel() else 1, n_cols, 0)
    for turn in range(_MIX):
        order = _random_order(keys.numel(), seed, 8 + turn)
        rows, cols = keys[order] // n_cols, keys[order] % n_cols
        band = rows // height if turn % 2 else cols // width
        by_band = torch.sort(band, stable=True).indices
        order, band = order[by_band], band[by_band]
        a, b = order[0::2][: order.numel() // 2], order[1::2]
        same = band[0::2][: order.numel() // 2] == band[1::2]
        a, b = a[same], b[same]
        new_a = keys[a] // n_cols * n_cols + keys[b] % n_cols
        new_b = keys[b] // n_cols * n_cols + keys[a] % n_cols
        # A new position must be free, and wanted by this pair alone.
        wanted, where, times = torch.unique(
            torch.cat([new_a, new_b]), return_inverse=True, return_counts=True
        )
        free = (times == 1)[where] & ~torch.isin(wanted, keys)[where]
        good = free[: a.numel()] & free[a.numel() :]
        keys = keys.clone()
        keys[a[good]], keys[b[good]] = new_a[good], new_b[good]
    return keys

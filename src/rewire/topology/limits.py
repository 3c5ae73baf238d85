"""Draws, grows and checks topologies within limits on fan-in, fan-out and blocks
(`rewire.budget.Limits`).

Everything takes O(K + rows + cols + blocks) memory. A *family* is one kind of limit: each position
is in one of its groups (its row, its column, its block), and a group has room for a number of
connections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewire import random
from rewire.budget import Limits
from rewire.topology.dealing import Grid, dealt, mixed
from rewire.topology.index import Index, TopologyError
from rewire.topology.prior import Positions, active_keys, dormant_keys
from rewire.topology.sampling import INITIAL

__all__ = ["first_fitting", "grow", "sample", "violation"]

#: Numbers of a round of draws, and the first number for the order of candidates.
_ROUNDS, _ORDER = 1 << 34, 1 << 60


def violation(index: Index, n_rows: int, n_cols: int, limits: Limits) -> str | None:
    """The limit that the connections in ``index`` exceed most, in words; None if they exceed
    none.
    """
    keys = active_keys(index, n_cols)
    rows, cols = keys // n_cols, keys % n_cols
    grid = Grid.of(n_rows, n_cols, limits)
    for name, room in zip(("row", "column", "block"), grid.room(rows, cols), strict=True):
        worst = int(room.argmin()) if room.numel() else 0
        if room.numel() and int(room[worst]) < 0:
            return (
                f"{name} {worst} has {-int(room[worst])} connections more than allowed: the limits "
                f"are {limits}"
            )
    return None


def first_fitting(groups: list[Tensor], room: list[Tensor], count: int) -> Tensor:
    """Take candidates in the order given, as far as all their groups have room; returns their
    places, ascending.

    The result, of at most ``count``, is that of a loop over the candidates, but it takes a few
    passes over all of them. A candidate surely fits if it fits even when all undecided candidates
    before it are taken, and surely does not if those already taken before it leave no room. Each
    pass decides at least the first undecided candidate.
    """
    n = groups[0].numel()
    device = groups[0].device
    taken = torch.zeros(n, dtype=torch.bool, device=device)
    open_ = torch.ones(n, dtype=torch.bool, device=device)
    # Leave out families in which no group can fill up.
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
    allowed: Positions | None = None,
) -> tuple[Tensor, Tensor]:
    """``count`` distinct positions, dormant or dropped, that fit ``limits`` once ``dropped`` are
    gone; int64 rows and cols.

    First come those of ``preferred`` (dormant or dropped positions, best first) that fit in their
    order, then random positions, each drawn uniformly from those that still fit. If this gets
    stuck, dropped positions complete it; if they do not fit beside the positions chosen, the later
    half of the chosen ones is given up, again and again. So this always finds ``count`` positions
    if no more grow than were dropped; otherwise it may raise `TopologyError`.

    O(K + rows + cols + blocks) time and memory, with a logarithm, in a few rounds; within
    ``allowed`` positions, O(their number) as well.
    """
    grid = Grid.of(n_rows, n_cols, limits)
    device = index.row_ptr.device
    keys = active_keys(index, n_cols)
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
        if allowed is None:
            wanted = need << wasted
            found, everything = _draw(grid, room, wanted, seed, step, stream, attempt, device)
        else:
            found = _shuffled_keys(dormant_keys(allowed, index, n_cols, gone), seed, step, stream)
            everything = True
        more = _take(grid, found, kept, chosen, room, count)
        wasted = 0 if more.numel() > chosen.numel() else wasted + 1
        chosen = more
        if everything:
            break
    order = random.bits(seed, step, stream, _ORDER - 1 - torch.arange(gone.numel(), device=device))
    gone = gone[torch.sort(order).indices]
    while chosen.numel() < count:
        taken = torch.cat([kept, chosen])
        room = grid.room(taken // n_cols, taken % n_cols)
        whole = _take(grid, gone, kept, chosen, room, count)
        if whole.numel() < count and not chosen.numel():
            raise TopologyError(
                f"cannot grow {count} connections where {gone.numel()} are dropped and "
                f"{kept.numel()} stay, within {limits}"
            )
        chosen = whole if whole.numel() == count else chosen[: chosen.numel() // 2]
    return chosen // n_cols, chosen % n_cols


def _take(
    grid: Grid, keys: Tensor, kept: Tensor, chosen: Tensor, room: list[Tensor], count: int
) -> Tensor:
    """``chosen`` and the first of ``keys`` that are free and fit, at most ``count``; updates
    ``room``.

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


def _shuffled_keys(keys: Tensor, seed: int, step: int, stream: int) -> Tensor:
    """``keys`` in random order."""
    numbers = random.bits(
        seed, step, stream, _ORDER + torch.arange(keys.numel(), device=keys.device)
    )
    return keys[torch.sort(numbers, stable=True).indices]


def _draw(
    grid: Grid,
    room: list[Tensor],
    need: int,
    seed: int,
    step: int,
    stream: int,
    attempt: int,
    device: torch.device,
) -> tuple[Tensor, bool]:
    """Positions (as row * cols + col) in random order whose rows, columns and blocks have room, and
    whether these are all such positions.
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


def sample(
    n_rows: int,
    n_cols: int,
    connections: int,
    limits: Limits,
    seed: int,
    *,
    allowed: Positions | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A random topology with exactly ``connections`` connections within ``limits``, sorted by (row,
    col); int64.

    Positions are drawn one after the other, uniformly from those that still fit. If that gets
    stuck, close to the maximum, connections are dealt out evenly over blocks, rows and columns,
    which works up to the maximum itself, with rows and columns permuted at random, and mixed by
    exchanges that keep every count. Raises ValueError above the maximum.

    ``start`` has the keys of connections that it has in any case. With these, or within ``allowed``
    positions, the maximum is not known: what gets stuck is tried a few times, and then raises
    `TopologyError` with the most that were found.
    """
    limits.check(n_rows, n_cols, connections)
    if allowed is not None or start is not None:
        keys = _within(Grid.of(n_rows, n_cols, limits), connections, seed, allowed, start)
        return keys // n_cols, keys % n_cols
    keys = _greedy(n_rows, n_cols, connections, limits, seed)
    if keys.numel() < connections:
        keys = mixed(n_cols, *dealt(n_rows, n_cols, connections, limits, seed), limits, seed)
    keys = torch.sort(keys).values
    return keys // n_cols, keys % n_cols


def _greedy(n_rows: int, n_cols: int, connections: int, limits: Limits, seed: int) -> Tensor:
    grid = Grid.of(n_rows, n_cols, limits)
    chosen = torch.empty(0, dtype=torch.int64)
    room = grid.room(chosen, chosen)
    kept, wasted = chosen, 0
    for attempt in range(12):
        need = connections - chosen.numel()
        if not need or wasted > 2:
            break
        found, everything = _draw(grid, room, need, seed, 0, INITIAL, attempt, chosen.device)
        more = _take(grid, found, kept, chosen, room, connections)
        wasted = wasted + 1 if more.numel() == chosen.numel() else 0
        chosen = more
        if everything:
            break
    return chosen


#: How often a topology within allowed positions is begun anew where it gets stuck.
_TRIES = 8


def _within(
    grid: Grid, connections: int, seed: int, allowed: Positions | None, start: Tensor | None
) -> Tensor:
    """The keys of a topology that has ``start`` and others of ``allowed``; ascending."""
    device = allowed.keys.device if allowed is not None else None
    known = torch.empty(0, dtype=torch.int64, device=device) if start is None else start
    room = grid.room(known // grid.cols, known % grid.cols)
    if any(bool((free < 0).any()) for free in room):
        raise TopologyError(f"the connections given exceed the limits: {grid.limits}")
    most = 0
    for attempt in range(_TRIES):
        chosen, free = known[:0], [r.clone() for r in room]
        need = connections - known.numel()
        if allowed is not None:
            found = _shuffled_keys(allowed.keys, seed, attempt, INITIAL)
            chosen = _take(grid, found, known, chosen, free, need)
        else:
            for turn in range(12):
                if chosen.numel() < need:
                    place = attempt, INITIAL, turn, known.device
                    found, _ = _draw(grid, free, need - chosen.numel(), seed, *place)
                    chosen = _take(grid, found, known, chosen, free, need)
        if chosen.numel() == need:
            return torch.sort(torch.cat([known, chosen])).values
        most = max(most, known.numel() + chosen.numel())
    raise TopologyError(
        f"no topology of {connections} connections was found within {grid.limits} that has the "
        f"given connections and keeps to the allowed positions: {most} were placed; allow fewer "
        "connections or more positions, or raise the limits"
    )

"""Topologies with up to the most connections that limits allow: dealt out evenly, then mixed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rewire import random
from rewire.budget import Limits
from rewire.topology.sampling import INITIAL

__all__ = ["Grid", "dealt", "mixed"]

#: More than any group can have.
_NO_LIMIT = 2**62
#: Rounds of exchanges in `mixed`.
_MIX = 6


class Grid(NamedTuple):
    """A matrix cut into blocks; without a limit on blocks, one block."""

    rows: int
    cols: int
    height: int
    width: int
    limits: Limits

    @classmethod
    def of(cls, rows: int, cols: int, limits: Limits) -> Grid:
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
        """How many connections each group can have beside those given, by family; int64."""
        limits = self.limits
        most = (limits.fan_in, limits.fan_out, limits.block[2] if limits.block else None)
        sizes = (self.rows, self.cols, self.down * self.across)
        return [
            (_NO_LIMIT if limit is None else limit) - torch.bincount(group, minlength=size)
            for limit, size, group in zip(most, sizes, self.groups(rows, cols), strict=True)
        ]


def dealt(
    n_rows: int, n_cols: int, connections: int, limits: Limits, seed: int
) -> tuple[Tensor, Tensor]:
    """Connections dealt out evenly: counts of blocks of a size differ by at most 1, and so do those
    of the rows, and of the columns, of a band.
    """
    grid = Grid.of(n_rows, n_cols, limits)
    counts = _block_counts(grid, connections)
    counts = counts[_permuted(grid.down, n_rows % grid.height, seed, 1)][
        :, _permuted(grid.across, n_cols % grid.width, seed, 2)
    ]
    heights = torch.full((grid.down,), grid.height)
    widths = torch.full((grid.across,), grid.width)
    heights[-1] = n_rows - (grid.down - 1) * grid.height
    widths[-1] = n_cols - (grid.across - 1) * grid.width
    flat = counts.flatten()
    block = torch.repeat_interleave(torch.arange(flat.numel()), flat)
    t = torch.arange(block.numel()) - (flat.cumsum(0) - flat)[block]
    down, across = block // grid.across, block % grid.across
    h, w = heights[down], widths[across]
    # Rows of a band continue where the block before ended, columns where the block above ended.
    row_start = (counts.cumsum(1) - counts).flatten()[block]
    col_start = (counts.cumsum(0) - counts).flatten()[block]
    cycle = h * w // torch.gcd(h, w)  # so many steps along a diagonal, then one to the side
    aside = (flat[block] // cycle) - t // cycle
    row = (row_start + t) % h + down * grid.height
    col = (col_start + t + aside) % w + across * grid.width
    return _shuffled(row, n_rows, grid.height, seed, 3), _shuffled(col, n_cols, grid.width, seed, 4)


def _block_counts(grid: Grid, connections: int) -> Tensor:
    """Connections of every block (down x across), evenly: counts of blocks of a size differ by at
    most 1.
    """
    limits = grid.limits
    fan_in = min(limits.fan_in or grid.cols, grid.cols)
    fan_out = min(limits.fan_out or grid.rows, grid.rows)
    count = limits.block[2] if limits.block else grid.rows * grid.cols
    # (bands, size of each): the whole ones, and a last one if there is a remainder
    rows, cols = (
        [(length // size, size), (int(length % size > 0), length % size)]
        for length, size in ((grid.rows, grid.height), (grid.cols, grid.width))
    )
    supply = [n * h * fan_in for n, h in rows]
    demand = [n * w * fan_out for n, w in cols]
    most = [[n * m * min(count, h * w) for m, w in cols] for n, h in rows]
    flow = _flow(supply, demand, most, connections)
    counts = torch.zeros(grid.down, grid.across, dtype=torch.int64)
    row_at, col_at = [0, rows[0][0]], [0, cols[0][0]]
    for i, (n, _) in enumerate(rows):
        for j, (m, _) in enumerate(cols):
            if n and m:
                # Remainders continue where those of the neighbouring size ended, so that sums are
                # even too.
                start_row = flow[i][0] % n if j else 0
                start_col = flow[0][j] % m if i else 0
                even = _even(n, m, flow[i][j], start_row, start_col)
                counts[row_at[i] : row_at[i] + n, col_at[j] : col_at[j] + m] = even
    return counts


def _even(n: int, m: int, total: int, start_row: int, start_col: int) -> Tensor:
    """``total`` dealt out over n x m cells: cells, sums of rows and sums of columns differ by at
    most 1 each.
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
            raise AssertionError("Limits.check has passed, so everything fits")
        for i, j, sign in path:
            flow[i][j] += sign * amount
        left[source] -= amount
        wanted[sink] -= amount
        sent += amount
    return flow


def _random_order(n: int, seed: int, what: int) -> Tensor:
    keys = random.bits(seed, 1, INITIAL, (what << 40) + torch.arange(n))
    return torch.sort(keys, stable=True).indices


def _permuted(n: int, ragged: int, seed: int, what: int) -> Tensor:
    """A random order of n bands; a last band of another size stays last."""
    order = _random_order(n - 1 if ragged else n, seed, what)
    return torch.cat([order, torch.tensor([n - 1])]) if ragged else order


def _shuffled(places: Tensor, n: int, band: int, seed: int, what: int) -> Tensor:
    """Rename rows (or columns) at random within their bands."""
    order = _random_order(n, seed, what)
    order = order[torch.sort(order // band, stable=True).indices]
    return order[places]


def mixed(n_cols: int, rows: Tensor, cols: Tensor, limits: Limits, seed: int) -> Tensor:
    """Exchange the columns of random pairs of connections, which keeps every fan-in and fan-out.

    Both connections of a pair are in one band of rows or of columns, which keeps the counts of
    blocks.
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
        # A new position must be free, and no other pair may want it.
        wanted, where, times = torch.unique(
            torch.cat([new_a, new_b]), return_inverse=True, return_counts=True
        )
        free = (times == 1)[where] & ~torch.isin(wanted, keys)[where]
        good = free[: a.numel()] & free[a.numel() :]
        keys = keys.clone()
        keys[a[good]], keys[b[good]] = new_a[good], new_b[good]
    return keys

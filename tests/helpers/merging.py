"""Random changes of random pools whose lists are long enough to be merged in whole blocks, some of
them lopsided.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rewire import topology
from rewire.topology import build_index, replace_

SHAPES = ((1, 1), (1, 9000), (9000, 1), (3, 4000), (40, 300), (300, 40), (2000, 7), (64, 64))
KINDS = ("anywhere", "leftwards", "rightwards", "out", "in", "swapped")


def pool(
    shape: tuple[int, int], share: float, spare: int, kind: torch.dtype, generator: torch.Generator
):
    """rows and cols of a pool whose connections are in random slots; the occupied slots; the
    dormant positions.
    """
    size = shape[0] * shape[1]
    keys = torch.randperm(size, generator=generator)
    k = max(1, round(share * size))
    capacity = min(k + spare, size)
    occupied = torch.randperm(capacity, generator=generator)[:k]
    rows, cols = (torch.full((capacity,), -1, dtype=kind) for _ in range(2))
    rows[occupied], cols[occupied] = (keys[:k] // shape[1]).to(kind), (keys[:k] % shape[1]).to(kind)
    return rows, cols, occupied, keys[k:]


def cases(
    seed: int, dtypes: tuple[torch.dtype, ...] = (torch.int32, torch.int64)
) -> Iterator[tuple]:
    """shape, rows, cols, slots, new rows, new cols: of every shape, density and kind of change."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        for share in (0.1, 0.5, 0.97, 1.0):
            for number, what in enumerate(KINDS):
                rows, cols, occupied, dormant = pool(
                    shape, share, 40, dtypes[number % len(dtypes)], generator
                )
                n = min(
                    int(torch.randint(1, rows.numel() // 8 + 8, (), generator=generator)),
                    rows.numel(),
                )
                yield shape, rows, cols, *change(shape, rows, cols, occupied, dormant, n, what)


def change(shape, rows: Tensor, cols: Tensor, occupied: Tensor, dormant: Tensor, n: int, what: str):
    """n changes of one kind: connections wander anywhere, to the first or last rows, out, in, or
    change places.
    """
    position = rows[occupied].long() * shape[1] + cols[occupied].long()
    if what == "leftwards":
        occupied, dormant = occupied[position.argsort(descending=True)], dormant.sort().values
    elif what == "rightwards":
        occupied, dormant = occupied[position.argsort()], dormant.sort(descending=True).values
    if what == "in":
        slots = (rows < 0).nonzero().flatten()[:n]
        new = dormant[: slots.numel()]
        slots = slots[: new.numel()]
    elif what == "out":
        slots = occupied[:n]
        new = torch.full((slots.numel(),), -1)
    elif what == "swapped":
        slots = occupied[:n]
        new = (rows[slots].long() * shape[1] + cols[slots].long()).roll(1)
    else:
        slots = occupied[: min(n, dormant.numel())]
        new = dormant[: slots.numel()]
    return (
        slots,
        torch.where(new < 0, -1, new // shape[1]),
        torch.where(new < 0, -1, new % shape[1]),
    )


def check_merges(seed: int) -> int:
    """Every change against lists that are built anew; returns how many."""
    count = 0
    for shape, rows, cols, slots, new_rows, new_cols in cases(seed):
        index = build_index(rows, cols, *shape)
        replace_(rows, cols, index, *shape, slots, new_rows, new_cols)
        fresh = build_index(rows, cols, *shape)
        assert all(torch.equal(a, b) for a, b in zip(index, fresh, strict=True)), (
            shape,
            rows.numel(),
            slots.numel(),
        )
        count += 1
    return count


def check_candidates(seed: int) -> None:
    """Ranks in order and in disorder, of many rows and of few, against all dormant positions in
    order.
    """
    generator = torch.Generator().manual_seed(seed)
    none = torch.empty(0, dtype=torch.int64)
    for shape in SHAPES:
        for share in (0.1, 0.5, 0.97):
            rows, cols, _, dormant = pool(shape, share, 0, torch.int32, generator)
            if not dormant.numel():
                continue
            index, dormant = build_index(rows, cols, *shape), dormant.sort().values
            ranks = torch.randint(
                0, dormant.numel(), (min(dormant.numel(), 300),), generator=generator
            )
            some = (
                ranks.sort().values,
                ranks,
                torch.arange(dormant.numel()),
                ranks[:3].sort().values,
            )
            for chosen in some:
                r, c = topology.candidates(index, *shape, chosen, none, none)
                assert torch.equal(r * shape[1] + c, dormant[chosen])

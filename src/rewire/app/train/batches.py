"""Batches of samples in memory; their order is a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Samples are gathered and turned feature-major this many numbers at a time: often enough that a
# step costs no more than taking a view, and never a second copy of a large data set.
BLOCK_NUMBERS = 1 << 22


def derive_seed(seed: int, purpose: str, number: int = 0) -> int:
    """A seed for each purpose, so that no two parts of a run share random numbers."""
    digest = hashlib.sha256(f"rewire/{seed}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def make_generator(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """A generator seeded for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, number))


def split(
    x: Tensor, y: Tensor, share: float, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Hold out `share` of the samples, drawn by `seed`: (training part, validation part)."""
    held = round(share * len(y))
    order = torch.randperm(len(y), generator=make_generator(seed, "validation"))
    keep, out = order[held:].sort().values, order[:held].sort().values
    return (x[keep], y[keep]), (x[out], y[out])


class Batches:
    """Shuffled mini-batches; the last one of an epoch is smaller if the numbers do not divide."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, seed: int) -> None:
        self.x, self.y, self.batch_size, self.seed = x, y, batch_size, seed

    def __len__(self) -> int:
        return math.ceil(len(self.y) / self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from batch number `start` on."""
        order = torch.randperm(len(self.y), generator=make_generator(self.seed, "order", epoch))
        size, features = self.batch_size, self.x.shape[1]
        whole = len(self.y) // size
        per_block = max(1, BLOCK_NUMBERS // (size * features))
        for first in range(start, whole, per_block):
            count = min(per_block, whole - first)
            chosen = order[first * size : (first + count) * size]
            # Strides (1, batch) in every batch: the layout sparse products work in.
            x = (
                self.x[chosen]
                .view(count, size, features)
                .transpose(1, 2)
                .contiguous()
                .transpose(1, 2)
            )
            y = self.y[chosen].view(count, size)
            yield from zip(x.unbind(), y.unbind(), strict=True)
        if start <= whole and whole * size < len(self.y):
            chosen = order[whole * size :]
            yield self.x[chosen], self.y[chosen]

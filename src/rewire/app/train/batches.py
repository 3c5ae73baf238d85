"""Batches of samples in memory; their order is a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rewire.app.data.rows import Rows, select
from rewire.app.data.splitting import stratified

# Samples are gathered and turned feature-major this many numbers at a time: often enough that a
# step costs no more than taking a view, and never a second copy of a large data set.
BLOCK_NUMBERS = 1 << 22

#: How images can be changed at random, and the pixels by which a crop moves one.
AUGMENTATIONS = ("crop", "flip")
BORDER = 4


def derive_seed(seed: int, purpose: str, number: int = 0) -> int:
    """A seed for each purpose, so that no two parts of a run share random numbers."""
    digest = hashlib.sha256(f"rewire/{seed}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def make_generator(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """A generator seeded for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, number))


def split(
    x: Rows, y: Tensor, share: float, seed: int, *, stratify: bool = False
) -> tuple[tuple[Rows, Tensor], tuple[Rows, Tensor]]:
    """Hold out `share` of the samples, drawn by `seed`: (training part, validation part).

    With ``stratify`` each class has its share of both.
    """
    held, generator = round(share * len(y)), make_generator(seed, "validation")
    if stratify and held:
        keep, out = stratified(y, held, generator)
    else:
        order = torch.randperm(len(y), generator=generator)
        keep, out = order[held:].sort().values, order[:held].sort().values
    return (select(x, keep), y[keep]), (select(x, out), y[out])


class Inputs:
    """Samples in the shape that a network reads.

    Indexing with a slice or a tensor of numbers gives (samples, *shape).
    """

    def __init__(self, rows: Rows, shape: Sequence[int]) -> None:
        self.rows, self.shape = rows, torch.Size((len(rows), *shape))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return self.rows[index].view(-1, *self.shape[1:])


class Pieces:
    """Samples, ``size`` at a time, to be gone through again and again."""

    def __init__(self, inputs: Inputs | Tensor, size: int) -> None:
        self.inputs, self.size = inputs, size

    def __len__(self) -> int:
        return math.ceil(len(self.inputs) / self.size)

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self.inputs), self.size):
            yield self.inputs[first : first + self.size]


class Batches:
    """Shuffled mini-batches; the last one of an epoch is smaller if the numbers do not divide.

    Args:
        x: samples; those of a tensor (samples, features) come feature-major.
        y: what belongs to them.
        batch_size: samples of a batch.
        seed: decides order and augmentation.
        augment: some of `AUGMENTATIONS`, for samples of (channels, height, width) or
            (height, width).
    """

    def __init__(
        self,
        x: Inputs | Tensor,
        y: Tensor,
        batch_size: int,
        seed: int,
        augment: Sequence[str] = (),
        image_shape: Sequence[int] | None = None,
    ) -> None:
        self.x, self.y, self.batch_size, self.seed = x, y, batch_size, seed
        self.augment, self.image_shape = tuple(augment), tuple(image_shape or ())

    def __len__(self) -> int:
        return math.ceil(len(self.y) / self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from batch number `start` on."""
        order = torch.randperm(len(self.y), generator=make_generator(self.seed, "order", epoch))
        if not isinstance(self.x, Tensor) or self.augment:
            yield from self._one_by_one(order, epoch, start)
            return
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
            y = self.y[chosen].view(count, size, *self.y.shape[1:])
            yield from zip(x.unbind(), y.unbind(), strict=True)
        if start <= whole and whole * size < len(self.y):
            chosen = order[whole * size :]
            yield self.x[chosen], self.y[chosen]

    def _one_by_one(self, order: Tensor, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(start, len(self)):
            chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
            x = self.x[chosen]
            if self.augment:
                # a generator for each batch: a run that is resumed within an epoch finds its own
                generator = make_generator(self.seed, "augment", epoch * len(self) + number)
                x = augmented(x, self.image_shape, self.augment, generator)
            yield x, self.y[chosen]


def augmented(
    x: Tensor, shape: Sequence[int], kinds: Sequence[str], generator: torch.Generator
) -> Tensor:
    """Images changed at random, each for itself; of the shape that ``x`` has.

    "flip" mirrors every other one from left to right. "crop" moves it by up to `BORDER` pixels in
    both directions; what comes in from outside is 0.
    """
    channels, height, width = shape if len(shape) == 3 else (1, *shape)
    images, n = x.reshape(-1, channels, height, width), len(x)
    columns = torch.arange(width).expand(n, width)
    if "flip" in kinds:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows = torch.arange(height).expand(n, height)
    if "crop" in kinds:
        images = F.pad(images, [BORDER] * 4)
        moves = torch.randint(0, 2 * BORDER + 1, (2, n, 1), generator=generator)
        rows, columns = rows + moves[0], columns + moves[1]
    sample = torch.arange(n).view(n, 1, 1, 1)
    channel = torch.arange(channels).view(1, channels, 1, 1)
    picked = images[sample, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]
    return picked.reshape(x.shape)

"""Random positions to grow."""

from __future__ import annotations

from torch import Tensor

from rewire import topology
from rewire.methods.core.base import Pool, Purpose
from rewire.topology import limits as limited

__all__ = ["fitting", "random_dormant", "uniform"]


def uniform(
    pool: Pool, dropped: Tensor, count: int, seed: int, step: int, purpose: int = Purpose.GROW
) -> tuple[Tensor, Tensor]:
    """``count`` connections, uniform over the allowed ones dormant once ``dropped`` are gone,
    whatever the limits.
    """
    weight = pool.weight
    gone = weight.rows[dropped].long(), weight.cols[dropped].long()
    size, stream = (*weight.matrix_shape, count), pool.stream(purpose)
    return topology.sample_dormant(weight.index, *size, *gone, seed, step, stream, pool.allowed)


def random_dormant(
    pool: Pool, dropped: Tensor, count: int, seed: int, step: int, purpose: int = Purpose.GROW
) -> tuple[Tensor, Tensor]:
    """``count`` connections, uniform over those dormant once ``dropped`` are gone. O(count log)
    time.

    Under limits of the weight each is uniform over those that fit beside the ones before
    (`rewire.topology.limits.grow`), O(K).
    """
    if pool.weight.limits is not None:
        return fitting(pool, dropped, None, count, seed, step)
    return uniform(pool, dropped, count, seed, step, purpose)


def fitting(
    pool: Pool,
    dropped: Tensor,
    ranked: tuple[Tensor, Tensor] | None,
    count: int,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """``count`` connections within the limits of a weight that has some: the first of ``ranked``
    that fit, then random ones. ``ranked`` has dormant or dropped positions, best first, more than
    ``count`` if they are to suffice. O(K).
    """
    weight = pool.weight
    assert weight.limits is not None
    return limited.grow(
        weight.index,
        *weight.matrix_shape,
        count,
        weight.rows[dropped],
        weight.cols[dropped],
        weight.limits,
        seed,
        step,
        pool.stream(Purpose.GROW),
        ranked,
        pool.allowed,
    )

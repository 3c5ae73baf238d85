"""Counter-based random numbers: pure functions of ``(seed, step, stream, index)``.

A number depends on its coordinates alone. So results do not depend on threads, on how calls are
grouped or on what else was drawn, and a run can resume knowing its step only. The generator is
Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
the 128-bit counter is ``(index low, index high, step, stream)``, the 64-bit key is the seed, and
one call gives four 32-bit words.

These are the definitions in plain PyTorch, on any device. Native functions in `rewire.topology` and
`rewire.ops` give the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rewire import _native

__all__ = ["below", "bits", "distinct", "normal", "seed_from", "words"]

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

#: Seeds are in ``[0, 2**63)``, steps and streams in ``[0, 2**32)`` and ``[0, 2**31)``.
SEED_BOUND = 2**63


def seed_from(generator: torch.Generator | None = None) -> int:
    """Draw a seed from ``generator``, or from torch's default one, which `torch.manual_seed`
    sets.
    """
    return int(torch.randint(0, SEED_BOUND - 1, (), dtype=torch.int64, generator=generator).item())


def words(
    seed: int, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of the counters ``(c0, c1, c2, c3)`` under the key ``seed``.

    Counters are int64 tensors (broadcast together) or integers with values in ``[0, 2**32)``; the
    four results are int64 tensors with values in ``[0, 2**32)``.
    """
    like = next(c for c in (c0, c1, c2, c3) if isinstance(c, Tensor))
    full = [c if isinstance(c, Tensor) else torch.full_like(like, c) for c in (c0, c1, c2, c3)]
    a, b, c, d = (t & _MASK for t in torch.broadcast_tensors(*full))
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # The product wraps around in int64, which keeps its 64 bits; the masks take both halves.
        p, q = a * _MULTIPLIER[0], c * _MULTIPLIER[1]
        high_p, high_q = (p >> 32) & _MASK, (q >> 32) & _MASK
        a, b, c, d = high_q ^ b ^ k0, q & _MASK, high_p ^ d ^ k1, p & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return a, b, c, d


def bits(seed: int, step: int, stream: int, index: Tensor) -> Tensor:
    """63 random bits, as a non-negative int64, for each element of ``index`` (int64, any shape)."""
    w0, w1, _, _ = words(seed, index & _MASK, (index >> 32) & _MASK, step & _MASK, stream)
    return ((w1 << 32) | w0) & (SEED_BOUND - 1)


def below(seed: int, step: int, stream: int, index: Tensor, bound: int | Tensor) -> Tensor:
    """An integer in ``[0, bound)`` for each element of ``index``; bias at most ``bound /
    2**63``.
    """
    return bits(seed, step, stream, index) % bound


def normal(seed: int, step: int, stream: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """``n`` standard normal numbers, float32; number k depends on k alone, not on ``n``.

    Box-Muller on 24-bit uniforms in (0, 1]: counter ``k // 4`` gives four words, hence two pairs of
    normals. The largest possible magnitude is ``sqrt(-2 ln 2**-24) = 5.77``.
    """
    quads = torch.arange((n + 3) // 4, dtype=torch.int64, device=device)
    w = words(seed, quads & _MASK, (quads >> 32) & _MASK, step & _MASK, stream)
    out = torch.empty((quads.numel(), 4), dtype=torch.float32, device=device)
    for pair in (0, 2):
        u1, u2 = (((x >> 8) + 1).to(torch.float32) * 2.0**-24 for x in w[pair : pair + 2])
        radius, angle = torch.sqrt(-2.0 * torch.log(u1)), 2.0 * math.pi * u2
        out[:, pair], out[:, pair + 1] = radius * torch.cos(angle), radius * torch.sin(angle)
    return out.flatten()[:n]


def distinct(
    n: int,
    bound: int,
    seed: int,
    step: int,
    stream: int,
    *,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A uniformly random subset of ``n`` of the integers ``0 ... bound - 1``: int64, sorted
    ascending.

    By definition, also of the native function, these are the first ``n`` distinct values of the
    sequence ``below(seed, step, stream, offset + t, bound)``, t = 0, 1, ...; if ``2 n > bound``,
    the complement of the first ``bound - n`` distinct ones. Fewer than ``1.39 n`` draws are
    expected; memory is O(n). Raises ValueError unless 0 <= n <= bound.
    """
    if not 0 <= n <= bound:
        raise ValueError(
            f"cannot draw {n} distinct integers below {bound}: draw between 0 and {bound}"
        )
    if _native.available() and torch.device(device).type == "cpu":
        drawn: Tensor = torch.ops.rewire.distinct(n, bound, seed, step, stream, offset)
        return drawn
    if 2 * n > bound:
        left_out = _first_distinct(bound - n, bound, seed, step, stream, offset, device)
        keep = torch.ones(bound, dtype=torch.bool, device=device)  # bound < 2 n, so this is O(n)
        keep[left_out] = False
        return keep.nonzero().flatten()
    return _first_distinct(n, bound, seed, step, stream, offset, device)


def _first_distinct(
    n: int, bound: int, seed: int, step: int, stream: int, offset: int, device: torch.device | str
) -> Tensor:
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    expected = bound * -math.log1p(-n / bound)
    draws = int(expected + 4 * math.sqrt(expected)) + 16
    while True:
        counters = torch.arange(draws, dtype=torch.int64, device=device) + offset
        value, order = torch.sort(below(seed, step, stream, counters, bound), stable=True)
        is_first = torch.ones_like(value, dtype=torch.bool)
        is_first[1:] = value[1:] != value[:-1]
        value, drawn_at = value[is_first], order[is_first]
        if value.numel() >= n:
            return value[drawn_at <= drawn_at.kthvalue(n).values]
        draws *= 2

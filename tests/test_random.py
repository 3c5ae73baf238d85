"""The counter-based generator against published vectors, and what is drawn from it against the laws
it must follow.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rewire import random

ONES = 0xFFFFFFFF


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, from the paper's description."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k0, q & ONES, (p >> 32) ^ d ^ k1, p & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return a, b, c, d


def words(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, *rest = counter
    drawn = random.words(key[1] << 32 | key[0], torch.tensor([c0]), *rest)
    return tuple(int(w) for w in drawn)


# The vectors of Random123's kat_vectors (philox4x32 10).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert words(counter, key) == expected
    assert philox(counter, key) == expected


word = st.integers(0, ONES)


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_philox_equals_the_integers_of_the_paper(
    counter: tuple[int, ...], key: tuple[int, int]
) -> None:
    assert words(counter, key) == philox(counter, key)


@given(st.integers(0, 2**63 - 1), word, st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1))
def test_bits_are_the_first_two_words(seed: int, step: int, stream: int, index: int) -> None:
    w = philox((index & ONES, index >> 32, step, stream), (seed & ONES, seed >> 32))
    assert int(random.bits(seed, step, stream, torch.tensor(index))) == (w[1] << 32 | w[0]) & (
        2**63 - 1
    )


def test_words_broadcast_and_keep_the_shape() -> None:
    c0 = torch.arange(3)[:, None]
    c1 = torch.arange(4)[None, :]
    drawn = random.words(5, c0, c1, 0, 9)
    assert all(w.shape == (3, 4) for w in drawn)
    assert [int(w[2, 3]) for w in drawn] == list(philox((2, 3, 0, 9), (5, 0)))


def test_every_coordinate_matters() -> None:
    index = torch.arange(1000)
    base = random.bits(1, 2, 3, index)
    for other in (
        random.bits(2, 2, 3, index),
        random.bits(1 + 2**32, 2, 3, index),
        random.bits(1, 3, 3, index),
        random.bits(1, 2, 4, index),
        random.bits(1, 2, 3, index + 2**32),
    ):
        assert (base != other).all()


def test_below_stays_below_and_is_uniform() -> None:
    drawn = random.below(3, 0, 1, torch.arange(70_000), 7)
    assert stats.chisquare(np.bincount(drawn.numpy(), minlength=7)).pvalue > 1e-4
    each = random.below(3, 0, 1, torch.arange(6), torch.tensor([1, 2, 3, 10**12, 5, 1]))
    assert (each >= 0).all()
    assert each[0] == each[5] == 0


# --- normal ---------------------------------------------------------------------------------------


def test_normal_is_normal() -> None:
    drawn = random.normal(11, 4, 2, 100_001).double().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    n = drawn.size
    # Five standard errors of each moment.
    assert abs(drawn.mean()) < 5 / math.sqrt(n)
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(stats.skew(drawn)) < 5 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(drawn)) < 5 * math.sqrt(24 / n)
    # the four numbers of a counter, and neighbouring counters, are independent
    for lag in (1, 2, 3, 4):
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 5 / math.sqrt(n)
        squares = drawn**2
        assert abs(np.corrcoef(squares[:-lag], squares[lag:])[0, 1]) < 5 / math.sqrt(n)


def test_normal_is_box_muller_of_the_words() -> None:
    drawn = random.normal(9, 8, 7, 4).tolist()
    w = philox((0, 0, 8, 7), (9, 0))
    for pair in (0, 2):
        u1, u2 = (((x >> 8) + 1) * 2.0**-24 for x in w[pair : pair + 2])
        radius, angle = math.sqrt(-2 * math.log(u1)), 2 * math.pi * u2
        expected = (radius * math.cos(angle), radius * math.sin(angle))
        assert drawn[pair : pair + 2] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 1023])
def test_normal_number_k_depends_on_k_alone(n: int) -> None:
    drawn = random.normal(1, 2, 3, n)
    assert drawn.dtype == torch.float32
    assert drawn.shape == (n,)
    assert torch.equal(drawn, random.normal(1, 2, 3, 2000)[:n])


def test_normal_differs_between_steps_and_streams() -> None:
    base = random.normal(1, 2, 3, 100)
    assert not (base == random.normal(1, 3, 3, 100)).any()
    assert not (base == random.normal(1, 2, 4, 100)).any()


# --- distinct -------------------------------------------------------------------------------------


def first_distinct(n: int, bound: int, seed: int, step: int, stream: int, offset: int) -> list[int]:
    """The definition, drawn one by one."""
    seen: list[int] = []
    t = offset
    while len(seen) < n:
        w = philox((t & ONES, t >> 32, step, stream), (seed & ONES, seed >> 32))
        value = ((w[1] << 32 | w[0]) & (2**63 - 1)) % bound
        if value not in seen:
            seen.append(value)
        t += 1
    return sorted(seen)


@given(
    st.integers(0, 40).flatmap(lambda bound: st.tuples(st.integers(0, bound), st.just(bound))),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**31 - 1),
    st.sampled_from([0, 5, 7 << 32]),
)
def test_distinct_is_what_it_is_defined_to_be(
    size: tuple[int, int], seed: int, step: int, stream: int, offset: int
) -> None:
    n, bound = size
    drawn = random.distinct(n, bound, seed, step, stream, offset=offset)
    assert drawn.dtype == torch.int64
    if 2 * n > bound:
        left_out = first_distinct(bound - n, bound, seed, step, stream, offset)
        expected = [v for v in range(bound) if v not in left_out]
    else:
        expected = first_distinct(n, bound, seed, step, stream, offset)
    assert drawn.tolist() == expected


@pytest.mark.parametrize(
    ("n", "bound"), [(0, 0), (0, 5), (5, 5), (1, 1), (1000, 1000), (0, 2**62), (7, 2**62)]
)
def test_distinct_at_the_edges(n: int, bound: int) -> None:
    drawn = random.distinct(n, bound, 3, 0, 0)
    assert drawn.shape == (n,)
    assert torch.equal(drawn, drawn.unique())
    assert not n or (drawn[0] >= 0 and drawn[-1] < bound)


@pytest.mark.parametrize(("n", "bound"), [(-1, 5), (6, 5), (1, 0)])
def test_distinct_refuses_what_cannot_be(n: int, bound: int) -> None:
    with pytest.raises(ValueError, match=rf"cannot draw {n} distinct integers below {bound}"):
        random.distinct(n, bound, 0, 0, 0)


# bound 5: n = 1, 2 draw the subset, n = 3, 4 its complement
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_distinct_is_uniform_over_subsets(n: int) -> None:
    bound, draws = 5, 3000
    number = {subset: i for i, subset in enumerate(itertools.combinations(range(bound), n))}
    seen = np.zeros(len(number))
    for step in range(draws):
        seen[number[tuple(random.distinct(n, bound, 17, step, 1).tolist())]] += 1
    assert stats.chisquare(seen).pvalue > 1e-4


@pytest.mark.parametrize("n", [20_000, 50_000, 50_001, 80_000])
def test_distinct_of_many_is_uniform_over_positions(n: int) -> None:
    bound = 100_000
    drawn = random.distinct(n, bound, 5, 6, 7)
    assert drawn.numel() == n
    assert (drawn[1:] > drawn[:-1]).all()
    count = np.bincount(drawn.numpy() // 1000, minlength=100)
    # Without replacement the counts vary less than a multinomial's: rescale the statistic.
    statistic = ((count - n / 100) ** 2 / (n / 100)).sum() / (1 - n / bound)
    assert 1e-4 < stats.chi2(99).cdf(statistic) < 1 - 1e-4


def test_seed_from_follows_the_generator() -> None:
    torch.manual_seed(1)
    a = random.seed_from()
    torch.manual_seed(1)
    assert random.seed_from() == a
    b = random.seed_from(torch.Generator().manual_seed(4))
    assert random.seed_from(torch.Generator().manual_seed(4)) == b != a
    assert 0 <= b < random.SEED_BOUND

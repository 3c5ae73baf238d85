"""Budgets: exact sums within limits for whatever is possible, and the published formulas where
nothing saturates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewire import budget

Shape = tuple[int, ...]
NAMES = sorted(budget.DISTRIBUTIONS)

dimension = st.integers(1, 300)
shape = st.one_of(
    st.tuples(dimension, dimension),
    st.tuples(dimension, dimension, st.integers(1, 5), st.integers(1, 5)),
    st.tuples(dimension, dimension, st.integers(1, 7)),
)
shapes = st.lists(shape, min_size=1, max_size=7)


def sizes(of: Sequence[Shape]) -> list[int]:
    return [math.prod(s) for s in of]


@given(shapes, st.sampled_from(NAMES), st.data())
def test_counts_sum_exactly_and_keep_within_limits(
    of: list[Shape], name: str, data: st.DataObject
) -> None:
    total = data.draw(
        st.one_of(
            st.integers(len(of), sum(sizes(of))),
            st.integers(len(of), min(len(of) + 5, sum(sizes(of)))),
            st.integers(max(len(of), sum(sizes(of)) - 5), sum(sizes(of))),
        )
    )
    counts = budget.distribute(name, of, total)
    assert sum(counts) == total
    assert all(
        isinstance(n, int) and 1 <= n <= size for n, size in zip(counts, sizes(of), strict=True)
    )


@given(shapes, st.sampled_from(NAMES), st.integers(1, 1000))
def test_totals_that_cannot_be_are_refused(of: list[Shape], name: str, excess: int) -> None:
    for total in (len(of) - excess, sum(sizes(of)) + excess):
        with pytest.raises(
            ValueError,
            match=rf"total of {total} connections .* choose between "
            rf"{len(of)}",
        ):
            budget.distribute(name, of, total)


def rigl(of: Sequence[Shape], total: int, raw: Callable[[Shape], float]) -> list[float]:
    """RigL's solve (google-research/rigl, get_sparsities): densities epsilon * raw; the largest go
    dense.
    """
    dense: set[int] = set()
    size = sizes(of)
    while True:
        left = total - sum(size[i] for i in dense)
        probability = {i: raw(s) for i, s in enumerate(of) if i not in dense}
        if not probability:
            return [1.0] * len(of)
        epsilon = left / sum(p * size[i] for i, p in probability.items())
        largest = max(probability.values())
        if largest * epsilon <= 1:
            return [1.0 if i in dense else epsilon * probability[i] for i in range(len(of))]
        dense |= {i for i, p in probability.items() if p == largest}


RAW: dict[str, Callable[[Shape], float]] = {
    "uniform": lambda s: 1.0,
    "er": lambda s: (s[0] + s[1]) / (s[0] * s[1]),
    "erk": lambda s: sum(s) / math.prod(s),
}
RESNET = [
    (64, 3, 7, 7),
    (64, 64, 3, 3),
    (128, 64, 3, 3),
    (128, 128, 3, 3),
    (128, 64, 1, 1),
    (1000, 512),
]
MLP = [(300, 784), (100, 300), (10, 100)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of", [RESNET, MLP])
@pytest.mark.parametrize("density", [0.01, 0.03, 0.1, 0.5, 0.9])
def test_published_formula(name: str, of: list[Shape], density: float) -> None:
    total = round(density * sum(sizes(of)))
    expected = [d * size for d, size in zip(rigl(of, total, RAW[name]), sizes(of), strict=True)]
    counts = budget.distribute(name, of, total)
    assert all(abs(n - e) <= 1 + 1e-6 for n, e in zip(counts, expected, strict=True))


@given(shapes, st.sampled_from(NAMES), st.floats(0.001, 0.999))
def test_published_formula_where_every_weight_gets_a_connection(
    of: list[Shape], name: str, density: float
) -> None:
    total = max(len(of), round(density * sum(sizes(of))))
    expected = [d * size for d, size in zip(rigl(of, total, RAW[name]), sizes(of), strict=True)]
    if min(expected) < 1:
        # the published formula gives less than one connection there; the limits are tested above
        return
    counts = budget.distribute(name, of, total)
    assert all(abs(n - e) <= 1 + 1e-6 for n, e in zip(counts, expected, strict=True))


def test_erk_of_the_mlp_by_hand() -> None:
    # raw: 1084 / 235200, 400 / 30000, 110 / 1000; shares 1084 : 400 : 110
    assert budget.erk(MLP, 1594) == [1084, 400, 110]
    # The last saturates at 1000 of 1000; 23,000 are left for 1084 : 400.
    assert budget.erk(MLP, 24_000) == [16801, 6199, 1000]


def test_er_and_erk_agree_on_matrices_and_differ_on_kernels() -> None:
    assert budget.er(MLP, 5000) == budget.erk(MLP, 5000)
    assert budget.er(RESNET, 50_000) != budget.erk(RESNET, 50_000)


def test_equal_weights_share_equally_and_small_ones_keep_one() -> None:
    assert budget.uniform([(10, 10)] * 4, 41) == [11, 10, 10, 10]
    assert budget.uniform([(1000, 1000), (2, 2)], 100) == [99, 1]
    assert budget.uniform([(1, 1)] * 3, 3) == [1, 1, 1]


def test_order_of_the_weights_does_not_matter() -> None:
    assert budget.erk(RESNET[::-1], 30_000) == budget.erk(RESNET, 30_000)[::-1]


def test_huge_weights() -> None:
    of = [(10**6, 10**6), (10**6, 10**6), (10, 10**6)]
    for total in (10**7 + 1, 10**12 + 7, 2 * 10**12 + 3):
        for name in NAMES:
            counts = budget.distribute(name, of, total)
            assert sum(counts) == total
            assert all(1 <= n <= s for n, s in zip(counts, sizes(of), strict=True))


def test_unknown_distribution_and_bad_shapes() -> None:
    with pytest.raises(
        ValueError,
        match=r"unknown distribution 'earth': choose one of er, erk, "
        r"uniform",
    ):
        budget.distribute("earth", MLP, 100)
    for bad in [(5,), (0, 5), (5, -1)]:
        with pytest.raises(ValueError, match="at least two dimensions"):
            budget.erk([bad], 1)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, math.nan, math.inf, -math.inf])
def test_density_outside_its_limits(density: float) -> None:
    with pytest.raises(ValueError, match="density must be above 0 and at most 1"):
        budget.connections_of(density, 100)


def test_density_to_connections() -> None:
    assert budget.connections_of(1.0, 123) == 123
    assert budget.connections_of(0.013, 784 * 300) == round(0.013 * 784 * 300)
    with pytest.raises(ValueError, match="leaves a weight of 10 potential connections without any"):
        budget.connections_of(0.01, 10)

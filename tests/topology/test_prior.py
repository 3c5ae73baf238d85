"""Allowed positions and frozen connections: drawn and grown exactly, against plain Python sets."""

from __future__ import annotations

import itertools
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewire import topology
from rewire.budget import Limits
from rewire.topology import Positions, Prior, TopologyError, sampling
from rewire.topology import limits as limited

ROWS, COLS = 7, 9
SIZE = ROWS * COLS


def keys_of(numbers: set[int] | list[int]) -> torch.Tensor:
    return torch.tensor(sorted(numbers), dtype=torch.int64)


def index_of(keys: torch.Tensor) -> topology.Index:
    return topology.build_index(keys // COLS, keys % COLS, ROWS, COLS)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[set[int], set[int], set[int]]:
    """Allowed positions, the active among them, and those of the active that are dropped."""
    allowed = draw(st.sets(st.integers(0, SIZE - 1), min_size=1))
    active = draw(st.sets(st.sampled_from(sorted(allowed))))
    dropped = draw(st.sets(st.sampled_from(sorted(active)))) if active else set()
    return allowed, active, dropped


@given(scenes())
def test_ranks_are_the_dormant_allowed_positions_and_then_the_dropped(
    scene: tuple[set[int], set[int], set[int]],
) -> None:
    allowed, active, dropped = scene
    wanted = [*sorted(allowed - active), *sorted(dropped)]
    gone = keys_of(dropped)
    for many in (0, 16):  # by a search for each, and by a list of all
        with patch.object(sampling, "_MANY", many):
            rows, cols = topology.candidates(
                index_of(keys_of(active)),
                ROWS,
                COLS,
                torch.arange(len(wanted)),
                gone // COLS,
                gone % COLS,
                Positions.of(keys_of(allowed), ROWS, COLS),
            )
        assert (rows * COLS + cols).tolist() == wanted
    found = topology.dormant_keys(
        Positions.of(keys_of(allowed), ROWS, COLS), index_of(keys_of(active)), COLS, gone
    )
    assert found.tolist() == sorted((allowed - active) | dropped)


@given(scenes())
def test_columns_drawn_in_rows_are_allowed_and_dormant(
    scene: tuple[set[int], set[int], set[int]],
) -> None:
    allowed, active, dropped = scene
    gone = keys_of(dropped)
    cols = topology.sample_dormant_in_rows(
        index_of(keys_of(active)),
        ROWS,
        COLS,
        gone // COLS,
        gone % COLS,
        3,
        1,
        2,
        Positions.of(keys_of(allowed), ROWS, COLS),
    )
    grown = ((gone // COLS) * COLS + cols).tolist()
    assert len(set(grown)) == len(grown)
    assert set(grown) <= (allowed - active) | dropped


def test_all_positions_allowed_is_the_same_draw_as_none() -> None:
    """The same numbers choose the same positions, in plain PyTorch and in the native function."""
    every = Positions.of(torch.arange(SIZE), ROWS, COLS)
    active = topology.sample(ROWS, COLS, 20, 5)
    index = topology.build_index(*active, ROWS, COLS)
    dropped = active[0][::3], active[1][::3]
    for n, many in itertools.product((0, 1, 7, SIZE - 20 + dropped[0].numel()), (0, 16)):
        size = index, ROWS, COLS, n, *dropped, 1, 2, 3
        with patch.object(sampling, "_MANY", many):
            within = topology.sample_dormant(*size, every)
        for a, b in zip(topology.sample_dormant(*size), within, strict=True):
            assert torch.equal(a, b)


def test_the_draw_is_uniform_over_the_dormant_allowed_positions() -> None:
    allowed = {0, 4, 8, 9, 20, 21, 40, 41, 62}
    active, dropped = {4, 20, 62}, keys_of({20})
    places = Positions.of(keys_of(allowed), ROWS, COLS)
    index, counts, rounds = index_of(keys_of(active)), Counter[int](), 3500
    for seed in range(rounds):
        rows, cols = topology.sample_dormant(
            index, ROWS, COLS, 2, dropped // COLS, dropped % COLS, seed, 1, 1, places
        )
        counts.update((rows * COLS + cols).tolist())
    wanted = (allowed - active) | {20}
    assert set(counts) == wanted
    expected = 2 * rounds / len(wanted)
    # chi-square with 6 degrees of freedom: above 22.5 once in a thousand
    assert sum((c - expected) ** 2 / expected for c in counts.values()) < 22.5


@given(scenes(), st.integers(0, 99), st.floats(0, 1))
def test_a_first_topology_has_what_is_given_and_nothing_outside(
    scene: tuple[set[int], set[int], set[int]], seed: int, share: float
) -> None:
    allowed, start, _ = scene
    count = len(start) + int(share * (len(allowed) - len(start)))
    places = Positions.of(keys_of(allowed), ROWS, COLS)
    rows, cols = topology.sample(ROWS, COLS, count, seed, allowed=places, start=keys_of(start))
    keys = (rows * COLS + cols).tolist()
    assert keys == sorted(set(keys))
    assert len(keys) == count
    assert start <= set(keys) <= allowed
    with pytest.raises(TopologyError, match=f"of which {len(allowed)} positions are allowed"):
        topology.sample(ROWS, COLS, len(allowed) + 1, seed, allowed=places)


@given(scenes(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None)
def test_growth_within_limits_and_allowed_positions(
    scene: tuple[set[int], set[int], set[int]], fan_in: int, fan_out: int, seed: int
) -> None:
    allowed, active, _ = scene
    limits = Limits(fan_in=fan_in, fan_out=fan_out)
    places = Positions.of(keys_of(allowed), ROWS, COLS)
    # a valid topology to begin with: the first of the active ones that fit
    now: list[int] = []
    for key in sorted(active):
        in_row = sum(k // COLS == key // COLS for k in now)
        in_col = sum(k % COLS == key % COLS for k in now)
        if in_row < fan_in and in_col < fan_out:
            now.append(key)
    gone = keys_of(now[::2])
    rows, cols = limited.grow(
        index_of(keys_of(now)),
        ROWS,
        COLS,
        gone.numel(),
        gone // COLS,
        gone % COLS,
        limits,
        seed,
        1,
        1,
        None,
        places,
    )
    after = (set(now) - set(gone.tolist())) | set((rows * COLS + cols).tolist())
    assert len(after) == len(now)
    assert after <= allowed
    assert max(Counter(k // COLS for k in after).values(), default=0) <= fan_in
    assert max(Counter(k % COLS for k in after).values(), default=0) <= fan_out


def test_a_topology_within_limits_that_is_not_found_says_so() -> None:
    places = Positions.of(torch.arange(COLS), ROWS, COLS)  # one row
    rows, _ = limited.sample(ROWS, COLS, 4, Limits(fan_in=4), 0, allowed=places)
    assert rows.tolist() == [0] * 4
    with pytest.raises(TopologyError, match=r"no topology of 5 connections .* 4 were placed"):
        limited.sample(ROWS, COLS, 5, Limits(fan_in=4), 0, allowed=places)
    with pytest.raises(TopologyError, match="given exceed the limits: fan-in 2"):
        limited.sample(ROWS, COLS, 5, Limits(fan_in=2), 0, start=torch.arange(3))
    rows, cols = limited.sample(ROWS, COLS, 20, Limits(fan_in=4), 0, start=torch.arange(3))
    assert set(range(3)) <= set((rows * COLS + cols).tolist())
    assert torch.bincount(rows).max() <= 4


def test_what_a_prior_says() -> None:
    prior = Prior.of(ROWS, COLS, torch.tensor([5, 3, 3]), torch.tensor([9]))
    assert prior is not None
    assert prior.allowed is not None
    assert prior.allowed.keys.tolist() == [3, 5, 9]  # what is frozen is allowed
    assert str(prior) == "3 allowed positions, 1 frozen connections"
    assert prior.kinds == ("allowed", "frozen")
    assert prior.violation(index_of(torch.tensor([3, 9])), COLS) is None
    assert "(1, 0) is frozen" in str(prior.violation(index_of(torch.tensor([3])), COLS))
    assert "(0, 4) is not at one of the 3" in str(
        prior.violation(index_of(torch.tensor([4, 9])), COLS)
    )
    assert Prior.of(ROWS, COLS) is None
    assert Prior.of(ROWS, COLS, None, torch.tensor([], dtype=torch.int64)) is None
    with pytest.raises(TopologyError, match="no position"):
        Prior.of(ROWS, COLS, torch.tensor([], dtype=torch.int64))
    with pytest.raises(TopologyError, match=r"\(7, 0\) is outside the 7 x 9"):
        Prior.of(ROWS, COLS, torch.tensor([SIZE]))


@pytest.mark.parametrize(
    ("allowed", "frozen", "words"),
    [
        (torch.tensor([3, 1]), None, "allowed must be positions in ascending order"),
        (torch.tensor([1, 1]), None, "allowed must be positions in ascending order"),
        (torch.tensor([[1]]), None, "allowed must be positions in ascending order"),
        (torch.tensor([1.0]), None, "allowed must be positions in ascending order"),
        (torch.tensor([1], device="meta"), None, "allowed must be positions in ascending order"),
        (None, torch.tensor([-1]), "outside"),
        (torch.tensor([1]), torch.tensor([2]), "position that is not allowed"),
    ],
)
def test_what_a_file_may_not_say(
    allowed: torch.Tensor | None, frozen: torch.Tensor | None, words: str
) -> None:
    with pytest.raises(TopologyError, match=words):
        Prior.saved(ROWS, COLS, allowed, frozen)

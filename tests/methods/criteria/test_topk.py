"""The running top-k over tiles equals sorting everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewire import ops
from rewire.methods.core.base import Pool
from rewire.methods.criteria import topk
from rewire.methods.criteria.topk import Best, top
from rewire.nn import SparseWeight


def brute(scores: Tensor, weight: SparseWeight, dropped: Tensor, count: int) -> Tensor:
    """Keys of the best candidates: sort all, ties by position."""
    active = torch.zeros(weight.matrix_shape, dtype=torch.bool)
    stays = weight.rows >= 0
    stays[dropped] = False
    active[weight.rows[stays].long(), weight.cols[stays].long()] = True
    keys = (~active).flatten().nonzero().flatten()
    order = torch.sort(-scores.flatten()[keys], stable=True).indices
    return keys[order[:count]].sort().values


@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 12),
    levels=st.integers(1, 30),
    tile=st.integers(1, 60),
    share=st.floats(0.05, 1),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_top_is_sorting_everything(
    rows: int, cols: int, levels: int, tile: int, share: float, seed: int, data: st.DataObject
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = SparseWeight((rows, cols), max(1, int(share * rows * cols)), generator=g)
    pool = Pool(0, "w", weight, torch.optim.SGD([weight.values], lr=0.1), 0)
    dropped = torch.randperm(weight.capacity, generator=g)[
        : data.draw(st.integers(0, weight.capacity))
    ]
    free = weight.size - weight.connections + dropped.numel()
    count = data.draw(st.integers(0, free))
    scores = torch.randint(0, levels, (rows, cols), generator=g).float()  # with ties
    r, c, found = top(lambda a, b: scores[a:b].clone(), pool, dropped, count, tile=tile)
    assert torch.equal(r * cols + c, brute(scores, weight, dropped, count))
    assert torch.equal(found, scores[r, c])


def test_nan_is_last_and_infinities_count() -> None:
    weight = SparseWeight.from_coo((2, 3), torch.tensor([0]), torch.tensor([0]), torch.ones(1))
    pool = Pool(0, "w", weight, torch.optim.SGD([weight.values], lr=0.1), 0)
    scores = torch.tensor([[9.0, torch.nan, 1.0], [torch.inf, -torch.inf, 2.0]])
    none = torch.empty(0, dtype=torch.int64)
    for count, expected in ((1, [3]), (3, [2, 3, 5]), (5, [1, 2, 3, 4, 5])):
        rows, cols, _ = top(lambda a, b: scores[a:b].clone(), pool, none, count)
        assert (rows * 3 + cols).tolist() == expected
    with pytest.raises(ValueError, match="5 are dormant"):
        top(lambda a, b: scores[a:b].clone(), pool, none, 6)


def test_best_keeps_the_first_among_equals_over_many_pieces() -> None:
    best = Best(3)
    for key, score in enumerate([1.0, 5.0, 5.0, 1.0, 5.0, 5.0, 2.0, -torch.inf]):
        best.add(torch.tensor([key]), torch.tensor([score]))
    keys, scores = best.result()
    assert keys.tolist() == [1, 2, 4]
    assert scores.tolist() == [5.0, 5.0, 5.0]
    assert not Best(0).result()[0].numel()


@pytest.mark.parametrize("draw", [None, ops.Draw(3, 4, 5, 1e-30)])
@pytest.mark.parametrize("misleading", [0.0, 0.5, 2.0, 1e9])
def test_a_sample_of_scores_changes_nothing(draw: ops.Draw | None, misleading: float) -> None:
    """Even one that misleads: too low a bar takes longer, and after too high a one the search
    begins anew.
    """
    g = torch.Generator().manual_seed(0)
    weight = SparseWeight((700, 900), 5000, generator=g)
    pool = Pool(0, "w", weight, torch.optim.SGD([weight.values], lr=0.1), 0)
    scores = torch.randn(weight.matrix_shape, generator=g).round(decimals=2)  # with ties
    dropped = torch.randperm(5000, generator=g)[:3000]
    active = torch.zeros(weight.matrix_shape, dtype=torch.bool)
    active[weight.rows.long(), weight.cols.long()] = True
    calls: list[int] = []

    def block(start: int, stop: int) -> Tensor:
        calls.append(start)
        return scores[start:stop].clone()

    def at(rows: Tensor, cols: Tensor) -> Tensor:
        assert rows.numel() == topk.SAMPLE
        assert not active[rows, cols].any()
        assert torch.equal(rows * 900 + cols, torch.unique(rows * 900 + cols))
        return (
            misleading * scores[rows, cols]
            if misleading
            else torch.full_like(scores[rows, cols], torch.nan)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "SAMPLE", 1 << 13)
        for absolute in (True, False) if draw is None else (True,):
            options = {"absolute": absolute, "draw": draw, "tile": 9000}
            without = top(block, pool, dropped, 3000, **options)
            calls.clear()
            with_sample = top(block, pool, dropped, 3000, at=at, **options)
            assert calls.count(0) == (2 if misleading > 1 else 1)
            assert all(torch.equal(a, b) for a, b in zip(without, with_sample, strict=True))


def test_scores_that_are_nearly_all_zero() -> None:
    """Silent units: the sample has nothing but zeros, and neither time nor memory goes out of
    bounds.
    """
    weight = SparseWeight((700, 900), 5000)
    pool = Pool(0, "w", weight, torch.optim.SGD([weight.values], lr=0.1), 0)
    scores = torch.zeros(weight.matrix_shape)
    scores[650, ::9] = torch.arange(1.0, 101.0)
    slots = weight.active()[:3000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "SAMPLE", 1 << 13)
        rows, cols, found = top(
            lambda a, b: scores[a:b],
            pool,
            slots,
            3000,
            at=lambda r, c: scores[r, c],
            absolute=True,
            tile=9000,
        )
    assert torch.equal(rows * 900 + cols, brute(scores, weight, slots, 3000))
    assert torch.equal(found, scores[rows, cols])

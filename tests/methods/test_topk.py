"""The running top-k over tiles equals sorting everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewire.methods.base import Pool
from rewire.methods.topk import Best, top
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
    rows=st.integers(1, 12), cols=st.integers(1, 12), levels=st.integers(1, 30), tile=st.integers(1, 60),
    share=st.floats(0.05, 1), seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
def test_top_is_sorting_everything(
    rows: int, cols: int, levels: int, tile: int, share: float, seed: int, data: st.DataObject
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = SparseWeight((rows, cols), max(1, int(share * rows * cols)), generator=g)
    pool = Pool(0, "w", weight, torch.optim.SGD([weight.values], lr=0.1), 0)
    dropped = torch.randperm(weight.capacity, generator=g)[: data.draw(st.integers(0, weight.capacity))]
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
        best.add(torch.tensor([score]), torch.tensor([key]))
    keys, scores = best.result()
    assert keys.tolist() == [1, 2, 4]
    assert scores.tolist() == [5.0, 5.0, 5.0]
    assert not Best(0).result()[0].numel()

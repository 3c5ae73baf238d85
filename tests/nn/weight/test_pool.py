"""SparseWeight: construction, change, events, copies."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

from rewire.nn import Event, SparseLinear, SparseWeight
from rewire.topology import TopologyError

# --- construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 6), (4, 3, 2, 2), (1, 1)])
def test_budget_is_exact(shape: tuple[int, ...], check_pool: Any) -> None:
    size = math.prod(shape)
    for k in {1, size // 2 or 1, size}:
        weight = SparseWeight(shape, k)
        check_pool(weight)
        assert weight.connections == weight.capacity == k
        assert weight.density == k / size
        assert (weight.shape, weight.size) == (torch.Size(shape), size)
        assert weight.matrix_shape == (shape[0], size // shape[0])
        assert weight.to_dense().shape == shape
    weight = SparseWeight((10, 10), density=0.37, capacity=60, dtype=torch.float64)
    check_pool(weight)
    assert (weight.connections, weight.capacity, weight.dtype) == (37, 60, torch.float64)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"connections": 0}, "between 1 and 30"),
    ({"connections": 31}, "between 1 and 30"),
    ({"connections": -3}, "between 1 and 30"),
    ({"connections": 2.5}, "whole number"),
    ({"connections": math.nan}, "whole number"),
    ({"connections": math.inf}, "whole number"),
    ({"density": 0.0}, "density must be above 0"),
    ({"density": 1.5}, "density must be above 0"),
    ({"density": math.nan}, "density must be above 0"),
    ({"density": 0.001}, "without any: use at least"),
    ({}, "exactly one of"),
    ({"connections": 3, "density": 0.5}, "exactly one of"),
    ({"connections": 3, "capacity": 2}, "capacity 2 does not fit"),
    ({"connections": 3, "capacity": 31}, "capacity 31 does not fit"),
    ({"connections": 3, "dtype": torch.int32}, "floating-point"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_numbers_are_refused_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseWeight((5, 6), **arguments)
    with pytest.raises(ValueError, match=message):
        SparseLinear(6, 5, **arguments)


@pytest.mark.parametrize("shape", [(5,), (), (0, 5), (5, -1), (2.5, 2)])
def test_bad_shapes(shape: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="at least two dimensions"):
        SparseWeight(shape, 1)


def test_generator_decides() -> None:
    def draw(seed: int) -> SparseLinear:
        return SparseLinear(20, 30, density=0.1, generator=torch.Generator().manual_seed(seed))

    a, b, c = draw(1), draw(1), draw(2)
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    assert a.weight.fingerprint() == b.weight.fingerprint() != c.weight.fingerprint()
    torch.manual_seed(5)
    d = SparseLinear(20, 30, density=0.1)
    torch.manual_seed(5)
    assert torch.equal(d.weight.to_dense(), SparseLinear(20, 30, density=0.1).weight.to_dense())


def test_degrees_and_coo_equal_scipy() -> None:
    weight = SparseWeight((30, 20), 150, capacity=170)
    nn.init.normal_(weight.values).data.masked_fill_(weight.rows < 0, 0)
    dense = weight.to_dense().detach().numpy()
    matrix = sparse.csr_array(dense)
    assert matrix.nnz == 150
    np.testing.assert_array_equal(weight.fan_in(), np.diff(matrix.indptr))
    np.testing.assert_array_equal(weight.fan_out(), np.diff(sparse.csc_array(dense).indptr))
    rows, cols, values = weight.coo()
    assert rows.dtype == cols.dtype == torch.int64
    coo = matrix.tocoo()
    np.testing.assert_array_equal(rows, coo.row)
    np.testing.assert_array_equal(cols, coo.col)
    np.testing.assert_array_equal(values.detach(), coo.data)


def test_to_dense_is_differentiable() -> None:
    weight = SparseWeight((4, 5, 2), 12, capacity=15)
    g = torch.randn(4, 5, 2)
    (weight.to_dense() * g).sum().backward()
    expected = torch.zeros(15)
    active = weight.rows >= 0
    expected[active] = g.reshape(4, 10)[weight.rows[active].long(), weight.cols[active].long()]
    assert torch.equal(weight.values.grad, expected)


# --- from_coo, from_dense -------------------------------------------------------------------------


def test_from_coo_keeps_slots(check_pool: Any) -> None:
    rows, cols, values = (
        torch.tensor([2, 0, 2]),
        torch.tensor([1, 3, 0]),
        torch.tensor([1.0, 2.0, 3.0]),
    )
    weight = SparseWeight.from_coo((3, 4), rows, cols, values, capacity=5)
    check_pool(weight)
    assert weight.rows.tolist() == [2, 0, 2, -1, -1]
    assert weight.values.tolist() == [1, 2, 3, 0, 0]
    dense = torch.zeros(3, 4)
    dense[rows, cols] = values
    assert torch.equal(weight.to_dense(), dense)
    assert (
        SparseWeight.from_coo((3, 4), rows, cols, values, dtype=torch.float64).dtype
        is torch.float64
    )


@pytest.mark.parametrize(
    ("row", "col", "message"),
    [
        ([0, 3], [0, 0], "outside"),
        ([0, 0], [0, 4], "outside"),
        ([0, -1], [0, 2], "outside"),
        ([0, -1], [0, -1], "outside"),  # an empty slot is no connection
        ([0, 2**32], [0, 0], "outside"),
        ([0, 0], [1, 2**32 + 2], "outside"),
        ([1, 1], [2, 2], r"\(1, 2\) occurs more than once"),
        ([0.0, 1.5], [0, 2], "must be int32 or int64"),
        ([0, 1], [0.0, 2.0], "must be int32 or int64"),
        ([0], [1, 2], "equally long"),
    ],
)
def test_from_coo_refuses(row: list[float], col: list[float], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        SparseWeight.from_coo((3, 4), torch.tensor(row), torch.tensor(col), torch.ones(2))


def test_from_dense(check_pool: Any) -> None:
    dense = torch.tensor([[0.0, -3.0, 1.0], [2.0, 0.0, -1.0]])
    every = SparseWeight.from_dense(dense)
    check_pool(every)
    assert every.connections == 4
    assert torch.equal(every.to_dense(), dense)
    # a tie of 1 and -1: the first position wins
    largest = SparseWeight.from_dense(dense, connections=3, capacity=5)
    check_pool(largest)
    assert torch.equal(largest.to_dense(), torch.tensor([[0.0, -3.0, 1.0], [2.0, 0.0, 0.0]]))
    kernel = torch.randn(3, 2, 5, 5)
    assert torch.equal(SparseWeight.from_dense(kernel).to_dense(), kernel)
    big = torch.randn(50, 40)
    kept = SparseWeight.from_dense(big, connections=300).to_dense()
    threshold = big.abs().flatten().sort(descending=True).values[299]
    assert torch.equal(kept, torch.where(big.abs() >= threshold, big, torch.zeros(())))
    with pytest.raises(ValueError, match="between 1 and 6"):
        SparseWeight.from_dense(dense, connections=7)


# --- rewire ---------------------------------------------------------------------------------------


def test_rewire_changes_its_slots_and_nothing_else(dormant: Any, check_pool: Any) -> None:
    layer = SparseLinear(8, 9, connections=30, capacity=35)
    weight = layer.weight
    weight.values.grad = torch.ones(35)
    before = copy.deepcopy(weight)
    slots = torch.tensor([7, 3, 31])  # one of them empty
    events: list[Event] = []
    handle = weight.follow(events.append)
    parameter, pointer = weight.values, weight.values.data_ptr()
    rows, cols = dormant(weight, 3)
    weight.rewire(slots, rows, cols, torch.tensor([1.0, 2.0, 3.0]))
    check_pool(weight)
    assert weight.values is parameter
    assert weight.values.data_ptr() == pointer
    assert weight.connections == 31
    assert weight.rows[slots].tolist() == rows.tolist()
    assert weight.cols[slots].tolist() == cols.tolist()
    assert weight.values[slots].tolist() == [1, 2, 3]
    assert weight.values.grad[slots].tolist() == [0, 0, 0]
    rest = torch.ones(35, dtype=torch.bool)
    rest[slots] = False
    for name in ("values", "rows", "cols"):
        assert torch.equal(getattr(weight, name)[rest], getattr(before, name)[rest])
    assert (weight.values.grad[rest] == 1).all()
    [event] = events
    assert event.weight is weight
    assert torch.equal(event.slots, slots)
    assert event.source is None
    assert not event.loaded
    handle.remove()
    # empty it, whatever the value said
    weight.rewire(slots[:1], torch.tensor([-1]), torch.tensor([-1]), 5.0)
    check_pool(weight)
    assert weight.connections == 30
    assert len(events) == 1


def test_values_of_new_connections(dormant: Any) -> None:
    weight = SparseWeight((5, 6), 4, capacity=8)
    nn.init.ones_(weight.values).data.masked_fill_(weight.rows < 0, 0)
    slots = torch.tensor([0, 4])
    weight.rewire(slots, *dormant(weight, 2), 0.25)
    assert weight.values.tolist() == [0.25, 1, 1, 1, 0.25, 0, 0, 0]
    weight.rewire(slots, *dormant(weight, 2))
    assert weight.values.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    weight.rewire(
        slots.int(),
        *(t.int() for t in dormant(weight, 2)),
        torch.tensor([2.0, 3.0], dtype=torch.float64),
    )
    assert weight.values.tolist() == [2, 1, 1, 1, 3, 0, 0, 0]


def test_swapping_positions_between_slots(check_pool: Any) -> None:
    weight = SparseWeight((5, 6), 10)
    nn.init.normal_(weight.values)
    before = weight.to_dense().detach().clone()
    slots = torch.tensor([2, 8])
    weight.rewire(
        slots,
        weight.rows[slots.flip(0)],
        weight.cols[slots.flip(0)],
        weight.values.detach()[slots.flip(0)],
    )
    check_pool(weight)
    assert torch.equal(weight.to_dense(), before)


def test_an_error_changes_nothing(dormant: Any, check_pool: Any) -> None:
    weight = SparseWeight((5, 6), 10, capacity=12)
    nn.init.ones_(weight.values).data.masked_fill_(weight.rows < 0, 0)
    weight.values.grad = torch.ones(12)
    before = [
        t.clone()
        for t in (weight.values, weight.rows, weight.cols, weight.values.grad, *weight.index)
    ]
    events: list[Event] = []
    weight.follow(events.append)
    r, c = dormant(weight, 2)
    two, taken = torch.tensor([0, 1]), (weight.rows[5].long(), weight.cols[5].long())
    bad: list[tuple[Any, ...]] = [
        (torch.tensor([0, 12]), r, c),
        (torch.tensor([0, -1]), r, c),
        (torch.tensor([0, 0]), r, c),
        (two, torch.tensor([0, 5]), c),
        (two, r, torch.tensor([0, 6])),
        (two, torch.stack([r[0], taken[0]]), torch.stack([c[0], taken[1]])),
        (two, r[:1], c[:1]),
        (two, r, c, torch.ones(3)),
        (two, r, c, torch.ones(1)),
        (two.float(), r, c),
        (torch.tensor([True] * 12), r, c),
        (two, r.float(), c),
        (two[:0], r, c),
    ]
    for arguments in bad:
        with pytest.raises(TopologyError):
            weight.rewire(*arguments)
        now = (weight.values, weight.rows, weight.cols, weight.values.grad, *weight.index)
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    assert not events
    check_pool(weight)


def test_rewiring_nothing_tells_nobody() -> None:
    weight = SparseWeight((5, 6), 10)
    events: list[Event] = []
    weight.follow(events.append)
    none = torch.empty(0, dtype=torch.int64)
    weight.rewire(none, none, none)
    assert not events


# --- resize, reorder ------------------------------------------------------------------------------


def test_resize_keeps_the_weight(check_pool: Any) -> None:
    layer = SparseLinear(6, 5, connections=10, capacity=14)
    weight, parameter = layer.weight, layer.weight.values
    weight.rewire(torch.tensor([0, 4]), torch.tensor([-1, -1]), torch.tensor([-1, -1]))
    dense = weight.to_dense().detach().clone()
    kept = weight.rows.clone()
    for capacity in (20, 9, 8, 30, 8):
        parameter.grad = torch.ones(weight.capacity)
        events: list[Event] = []
        handle = weight.follow(events.append)
        weight.resize(capacity)
        handle.remove()
        check_pool(weight)
        assert weight.values is parameter
        assert parameter.grad is None
        assert (weight.capacity, weight.connections) == (capacity, 8)
        assert torch.equal(weight.to_dense(), dense)
        assert [e.source.numel() for e in events] == [capacity]
        if capacity == 20:  # growing keeps every slot's number
            assert torch.equal(weight.rows[:14], kept)
        layer(torch.randn(3, 6)).sum().backward()
        assert parameter.grad.shape == (capacity,)
    weight.resize(8)  # nothing to do
    with pytest.raises(ValueError, match="capacity 7 is below the 8 active connections"):
        weight.resize(7)
    with pytest.raises(ValueError, match="capacity 31 is above the 30 potential connections"):
        weight.resize(31)
    check_pool(weight)


def test_reorder_is_a_permutation(check_pool: Any) -> None:
    weight = SparseWeight((5, 6), 10, capacity=13)
    shuffle = torch.randperm(13)
    rows, cols = weight.rows[shuffle].clone(), weight.cols[shuffle].clone()
    weight.rewire(torch.arange(13), torch.full((13,), -1), torch.full((13,), -1))
    weight.rewire(torch.arange(13), rows, cols, torch.randn(13))
    weight.values.grad = torch.arange(13.0) * (weight.rows >= 0)
    dense = weight.to_dense().detach().clone()
    at = {
        (r, c): g
        for r, c, g in zip(
            *(t.tolist() for t in (weight.rows, weight.cols, weight.values.grad)), strict=True
        )
    }
    weight.reorder()
    check_pool(weight)
    assert torch.equal(weight.to_dense(), dense)
    keys = (weight.rows * 6 + weight.cols)[:10]
    assert torch.equal(keys, keys.sort().values)
    assert (weight.rows[10:] == -1).all()
    for r, c, g in zip(
        *(t.tolist() for t in (weight.rows, weight.cols, weight.values.grad)), strict=True
    ):
        assert g == (at[r, c] if r >= 0 else 0)


def test_a_pool_without_connections(check_pool: Any) -> None:
    for weight in (SparseWeight.from_dense(torch.zeros(3, 4)), SparseWeight((3, 4), 2)):
        n = weight.capacity
        weight.rewire(torch.arange(n), torch.full((n,), -1), torch.full((n,), -1))
        check_pool(weight)
        layer = SparseLinear.from_weight(weight, torch.ones(3))
        x = torch.randn(2, 4, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert (y == 1).all()
        assert not x.grad.any()
        weight.reorder()
        weight.resize(5)
        check_pool(weight)
        weight.rewire(torch.tensor([3]), torch.tensor([2]), torch.tensor([1]), 2.0)
        assert weight.to_dense().sum() == 2


# --- copies ---------------------------------------------------------------------------------------


def test_repr_tells_the_budget() -> None:
    layer = SparseLinear(784, 300, connections=2352, bias=False)
    assert (
        "in_features=784, out_features=300, bias=False, connections=2352, density=0.01"
    ) in repr(layer)
    assert "capacity=20" in repr(SparseWeight((5, 6), 10, capacity=20))


def test_a_rewire_under_activation_checkpointing_raises() -> None:
    """Checkpointing computes saved tensors again, with the new topology: autograd's own check does
    not see it.
    """
    from torch.utils.checkpoint import checkpoint

    layer = SparseLinear(20, 15, connections=60, capacity=70)
    x = torch.randn(4, 20, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    layer.weight.rewire(torch.tensor([0]), torch.tensor([-1]), torch.tensor([-1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(3, dtype=torch.complex64), "real numbers"),
        (torch.zeros(3, device="meta"), "on the meta device"),
        (torch.zeros(3).to_sparse(), "ordinary tensor"),
        (1j, "a real number"),
        ("1", "a real number"),
        (torch.zeros(2), "as many as slots"),
    ],
)
def test_values_that_cannot_be_are_refused_before_anything_changes(
    values: Any, message: str, dormant: Any
) -> None:
    weight = SparseWeight((8, 6), connections=12)
    before = {name: t.clone() for name, t in weight.state_dict().items()}
    with pytest.raises(TopologyError, match=message):
        weight.rewire(torch.arange(3), *dormant(weight, 3), values)
    assert all(torch.equal(t, before[name]) for name, t in weight.state_dict().items())


def test_an_emptied_slot_is_zero_whatever_value_is_given(check_pool: Any) -> None:
    weight = SparseWeight((8, 6), connections=12)
    nowhere = torch.full((2,), -1)
    weight.rewire(torch.tensor([0, 1]), nowhere, nowhere, float("nan"))
    weight.rewire(torch.tensor([2, 3]), nowhere, nowhere, torch.full((2,), torch.inf))
    check_pool(weight)
    assert weight.connections == 8

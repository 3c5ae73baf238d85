"""No argument, and no other thread, makes a native function leave its arrays.

A damaged call may raise an error, or compute something of the damaged numbers. Bad accesses that do
not end the process are found where these tests run with AddressSanitizer (``make asan``).
``REWIRE_ATTACK`` multiplies the number of calls.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks import CALLS, ENTRIES, damage
from rewire import _native, topology
from rewire.nn import SparseWeight
from rewire.topology import TopologyError

pytestmark = pytest.mark.skipif(not _native.available(), reason="the C++ extension is not in use")

TIMES = float(os.environ.get("REWIRE_ATTACK", "1"))
REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, MemoryError, OverflowError)


def native(name: str, arguments: list[Any]) -> Any:
    return getattr(torch.ops.rewire, name)(*arguments)


def test_every_native_function_is_attacked() -> None:
    schemas = {
        s.name.partition("::")[2]
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("rewire::")
    }
    assert set(CALLS) == schemas - {"instruction_set"}


@pytest.mark.parametrize("name", CALLS)
def test_valid_calls_are_accepted(name: str) -> None:
    """Otherwise the attack would only ever see the first check."""
    for seed in range(30):
        torch.manual_seed(seed)
        arguments = CALLS[name](random.Random(seed), 40)
        native(name, arguments)


@pytest.mark.parametrize("name", CALLS)
def test_damaged_arguments(name: str) -> None:
    """One to three arguments are spoiled; the call ends, with a result or an error that Python can
    catch.
    """
    refused = 0
    calls = int(100 * TIMES)
    for seed in range(calls):
        choose = random.Random(seed)
        torch.manual_seed(seed)
        arguments = CALLS[name](choose, choose.choice((5, 40, 150)))
        for _ in range(choose.randint(1, 3)):
            damage(choose, arguments)
        try:
            native(name, arguments)
        except REFUSALS:
            refused += 1
    assert refused > calls // 20


@pytest.mark.parametrize(
    "name", [n for n in CALLS if n not in ("distinct", "feature_major", "batch_major")]
)
def test_another_thread_writes_to_the_arguments(name: str) -> None:
    """What was checked is what is used, whatever happens to the caller's tensors meanwhile."""
    torch.manual_seed(1)
    choose = random.Random(1)
    arguments = CALLS[name](choose, 100_000)
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.numel()]
    before = [t.clone() for t in tensors]
    stop = threading.Event()

    def scribble() -> None:
        own, pairs = random.Random(2), list(zip(tensors, before, strict=True))
        entries = {t.dtype: _entries(t.dtype) for t in tensors}
        while not stop.is_set():
            tensor, old = own.choice(pairs)
            wrong = entries[tensor.dtype]
            tensor.copy_(wrong[torch.randint(wrong.numel(), tensor.shape)])
            tensor.copy_(old)

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        for _ in range(int(40 * TIMES)):
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
            with contextlib.suppress(*REFUSALS):
                native(name, arguments)
    finally:
        stop.set()
        thread.join()


def _entries(dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point or dtype == torch.bool:
        return torch.tensor([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e-3]).to(dtype)
    limits = torch.iinfo(dtype)
    return torch.tensor([n for n in ENTRIES if limits.min <= n <= limits.max], dtype=dtype)


@pytest.mark.parametrize("ranks", [[2**63 - 1, 2**63 - 2], [0], [-1], [-(2**63)]])
def test_candidates_of_an_index_that_has_more_connections_than_columns(ranks: list[int]) -> None:
    rows = torch.arange(10)
    index = topology.build_index(rows, rows * 0, 10, 1)
    dropped = torch.tensor([7, 8, 9])
    with pytest.raises(RuntimeError, match="more connections than there are positions"):
        topology.candidates(index, 10, 0, torch.tensor(ranks), dropped, dropped)


@pytest.mark.parametrize(
    "name", ["row_ptr", "row_cols", "row_slots", "col_ptr", "col_rows", "col_slots", "rows", "cols"]
)
@pytest.mark.parametrize("entry", [-(2**31), -1, 0, 1, 29, 10**7, 2**31 - 1])
def test_whatever_is_done_to_a_pool_with_a_damaged_buffer(name: str, entry: int) -> None:
    """Every public way to use or change a pool ends, with a result or an error that Python can
    catch.
    """
    uses = {
        "reorder": lambda w: w.reorder(),
        "resize": lambda w: w.resize(w.capacity + 5),
        "rewire": lambda w: w.rewire(torch.arange(5), w.rows[:5].clone(), w.cols[:5].clone()),
        "coo": lambda w: w.coo(),
        "to_dense": lambda w: w.to_dense(),
        "fan_in": lambda w: w.fan_in(),
        "fingerprint": lambda w: w.fingerprint(),
        "state_dict": lambda w: SparseWeight((40, 30), connections=300).load_state_dict(
            w.state_dict()
        ),
        "sample": lambda w: topology.sample_dormant(
            w.index, 40, 30, 20, w.rows[:3].long(), w.cols[:3].long(), 1, 2, 3
        ),
    }
    for use in uses.values():
        weight = SparseWeight((40, 30), connections=300)
        getattr(weight, name)[3] = entry
        with contextlib.suppress(*REFUSALS):
            use(weight)


def test_reorder_of_a_damaged_index_changes_nothing() -> None:
    for name, entry in (("row_slots", 5), ("row_slots", 10**6), ("row_slots", -4)):
        weight = SparseWeight((40, 30), connections=300)
        getattr(weight, name)[3] = entry
        before = {k: v.clone() for k, v in (*weight.named_buffers(), *weight.named_parameters())}
        with pytest.raises(TopologyError, match="the index does not list the pool's connections"):
            weight.reorder()
        after = dict((*weight.named_buffers(), *weight.named_parameters()))
        assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_reorder_survives_a_damaged_pointer() -> None:
    weight = SparseWeight((40, 30), connections=300)
    dense = weight.to_dense()
    weight.row_ptr[3] = 10**7
    weight.reorder()  # which does not read it
    assert torch.equal(weight.to_dense(), dense)

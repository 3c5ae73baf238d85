"""Pools for the tests of native index functions, and both implementations."""

from __future__ import annotations

import contextlib

import torch
from hypothesis import strategies as st

from rewire import _native
from rewire.topology import TopologyError


@contextlib.contextmanager
def plain():
    """Within, the plain PyTorch definitions run."""
    native, _native.available = _native.available, lambda *_: False
    try:
        yield
    finally:
        _native.available = native


def both(function, *args, **kwargs):
    """Result of the native function and of the definition; errors (with their words) count as
    results.
    """
    results = []
    for context in (contextlib.nullcontext, plain):
        with context():
            try:
                results.append(function(*args, **kwargs))
            except TopologyError as error:
                results.append(str(error))
    return results


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def pool(n_rows, n_cols, connections, spare, seed, dtype=torch.int32):
    """rows and cols of a random pool whose connections are in random slots."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(n_rows * n_cols, generator=generator)[:connections]
    rows, cols = (torch.full((connections + spare,), -1, dtype=dtype) for _ in range(2))
    slots = torch.randperm(connections + spare, generator=generator)[:connections]
    rows[slots], cols[slots] = (keys // n_cols).to(dtype), (keys % n_cols).to(dtype)
    return rows, cols


@st.composite
def pools(draw, least=1):
    n_rows, n_cols = draw(st.integers(1, 12)), draw(st.integers(least, 12))
    connections = draw(st.integers(0, n_rows * n_cols))
    dtype = draw(st.sampled_from((torch.int32, torch.int64)))
    rows, cols = pool(
        n_rows, n_cols, connections, draw(st.integers(0, 4)), draw(st.integers(0, 999)), dtype
    )
    return rows, cols, n_rows, n_cols

"""The native random walk of DEEP R and its random numbers."""

from __future__ import annotations

import contextlib

import pytest
import torch

from index_pools import plain, same
from rewire import _native, random
from rewire.ops import add_normal_, langevin_step_

pytestmark = pytest.mark.skipif(not _native.available(), reason="the C++ extension is not in use")


def walk(n, dtype, noise, shrink=0.01, index_dtype=torch.int32):
    generator = torch.Generator().manual_seed(n)
    signs = (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).to(torch.int8)
    values = signs * torch.rand(n, dtype=dtype, generator=generator)
    rows = torch.randint(-1, 9, (n,), generator=generator).to(index_dtype)
    values[rows < 0] = 0
    arguments = (rows, signs, shrink, noise, 11, 12, 13)
    results = []
    for context in (contextlib.nullcontext, plain):
        with context():
            v = values.clone()
            results.append((v, langevin_step_(v, *arguments)))
    return results


@pytest.mark.parametrize("n", [0, 1, 3, 63, 64, 65, 127, 128, 129, 1000, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_langevin_without_noise_is_exact(n, dtype, index_dtype):
    native, definition = walk(n, dtype, 0.0, index_dtype=index_dtype)
    assert same(native, definition)


@pytest.mark.parametrize("n", [1, 3, 64, 129, 1000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_langevin_noise(n, dtype):
    (values, dropped), (expected, expected_dropped) = walk(n, dtype, 1.0, shrink=0.0)
    # A number within rounding of zero may fall on either side of it.
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=2e-6)
    apart = set(dropped.tolist()) ^ set(expected_dropped.tolist())
    assert all(abs(float(expected[k])) < 2e-6 for k in apart)
    assert torch.equal(dropped, dropped.sort().values)


def test_normals_agree_over_many_draws():
    n = 1 << 20
    values = torch.full((n,), 100.0, dtype=torch.float64)
    ones = torch.ones(n, dtype=torch.int8)
    langevin_step_(values, ones.int(), ones, 0.0, 1.0, 3, 4, 5)
    worst = (values - 100.0 - random.normal(3, 4, 5, n).double()).abs().max()
    assert worst < 1e-6


def test_langevin_is_the_same_on_any_number_of_threads():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(walk(100_001, torch.float32, 0.5)[0])
    finally:
        torch.set_num_threads(before)
    assert all(same(results[0], r) for r in results[1:])


@pytest.mark.parametrize("n", [0, 1, 129, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adding_normals(n, dtype):
    results = []
    for context in (contextlib.nullcontext, plain):
        with context():
            values = torch.arange(n).to(dtype) % 7
            add_normal_(values, 0.5, 3, 4, 5)
            results.append(values)
    strided = torch.zeros(2 * n, dtype=dtype)[::2]
    strided += torch.arange(n) % 7
    add_normal_(strided, 0.5, 3, 4, 5)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=3e-6)
    torch.testing.assert_close(strided, results[1], rtol=0, atol=3e-6)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.rewire.add_normal_(torch.zeros(8)[::2], 0.5, 3, 4, 5)


def test_langevin_refuses_what_it_cannot_read():
    values, rows, signs = (
        torch.zeros(4),
        torch.zeros(4, dtype=torch.int32),
        torch.ones(4, dtype=torch.int8),
    )
    step = torch.ops.rewire.langevin_step_
    for arguments, message in (
        ((values, rows[:3], signs), "same length"),
        ((values, rows, signs.int()), "int8"),
        ((torch.zeros(8)[::2], rows, signs), "contiguous"),
        ((values.half(), rows, signs), "float32 or float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            step(*arguments, 0.0, 0.0, 0, 0, 0)

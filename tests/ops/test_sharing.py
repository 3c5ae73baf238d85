"""How the work of a product is cut up, long rows and tiles of columns, shows in no result."""

from __future__ import annotations

import pytest
import torch

from interpreter import run_python
from problems import close, problem
from rewire import _native, ops

native = pytest.mark.skipif(not _native.available("spmm"), reason="the C++ extension is not in use")


def long_rows(dtype, index_dtype=torch.int32):
    """Two full rows (one the last) among rows of a few connections, as an all-full problem with
    most of it cut.
    """
    p = problem(60, 12_000, 30_000, dtype=dtype, index_dtype=index_dtype, spare=3)
    keep = p.dense != 0
    keep[[17, 59]] = True
    rows, cols = keep.nonzero(as_tuple=True)
    values = torch.randn(rows.numel(), dtype=dtype)
    ptr = torch.zeros(61, dtype=torch.int64)
    ptr[1:] = keep.sum(1).cumsum(0)
    dense = torch.zeros(60, 12_000, dtype=dtype)
    dense[rows, cols] = values
    lists = tuple(t.to(index_dtype) for t in (ptr, cols, torch.arange(rows.numel())))
    return lists, values, dense, (rows, cols)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("batch", [7, 128, 300])
def test_long_rows_are_shared_out(dtype, index_dtype, batch):
    lists, values, dense, (rows, cols) = long_rows(
        torch.float64 if dtype == torch.float64 else torch.float32, index_dtype
    )
    x, g, bias = (
        torch.randn(batch, 12_000).to(dtype),
        torch.randn(batch, 60).to(dtype),
        torch.randn(60).to(values.dtype),
    )
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-2}[dtype]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                (
                    ops.spmm(*lists, values, x, bias),
                    ops.sddmm(*lists, values.numel(), g, x),
                    *ops.spmm_sddmm(*lists, values, g, x),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    close(results[0][0], x.double() @ dense.double().t() + bias.double(), tolerance)
    close(results[0][2], x.double() @ dense.double().t(), tolerance)
    for found in (results[0][1], results[0][3]):
        close(found, (g.double().t() @ x.double())[rows, cols], min(tolerance, 1e-5))


TILES = """
import torch
from problems import problem
from rewire import ops
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for batch, spare in ((35, 0), (70, 0), (128, 2), (136, 0), (300, 0)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        p = problem(150, 400, 30_000, dtype=wide, spare=spare)
        x, g = torch.randn(batch, 400).to(dtype), torch.randn(batch, 150).to(dtype)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append((ops.spmm(*p.by_row, p.values, x, None),
                            ops.spmm(*p.by_col, p.values, g, None),
                            ops.sddmm(*p.by_row, 30_000 + spare, g, x),
                            *ops.spmm_sddmm(*p.by_col, p.values, x, g)))
        for a, b in zip(*results):
            assert torch.equal(a, b)
            print(a.double().sum().item().hex(), a.double().pow(2).sum().item().hex())
"""


@native
@pytest.mark.parametrize("cap", ["portable", "avx2", "avx512"])
def test_tiles_of_columns_change_no_bit(cap):
    """With a cache of 20 kB x is read in many tiles, with a huge one in one go."""
    small, large = (
        run_python(TILES, REWIRE_CPU_CAPABILITY=cap, REWIRE_CACHE_BYTES=size)
        for size in ("20000", "1000000000")
    )
    assert small.returncode == large.returncode == 0, small.stderr + large.stderr
    assert small.stdout == large.stdout
    assert small.stdout

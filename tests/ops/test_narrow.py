"""Products and copies of bfloat16 and float16 against dense float64, and their conversion against
torch's.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from problems import BATCHES, LAYOUTS, close, in_layout, problem, problems
from rewire import ops
from rewire.ops import reference

IMPLEMENTATIONS = [pytest.param(ops, id="dispatched"), pytest.param(reference, id="reference")]
NARROW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=100, deadline=None)
@given(
    p=problems(),
    dtype=st.sampled_from(NARROW),
    narrow_values=st.booleans(),
    batch=st.sampled_from(BATCHES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    with_bias=st.booleans(),
)
def test_narrow_products_agree_with_dense_ones(
    implementation, p, dtype, narrow_values, batch, layouts, with_bias
):
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(batch, n, generator=generator).to(dtype) for n in reversed(p.shape))
    if batch:
        x, g = in_layout(x, layouts[0]), in_layout(g, layouts[1])
    kind = dtype if narrow_values else torch.float32
    values, dense = p.values.to(kind), p.dense.to(kind).double()
    bias = torch.randn(p.shape[0], generator=generator).to(kind) if with_bias else None
    y = implementation.spmm(*p.by_row, values, x, bias)
    assert y.dtype == dtype
    assert y.t().is_contiguous()
    close(y, x.double() @ dense.t() + (0.0 if bias is None else bias.double()))
    close(implementation.spmm(*p.by_col, values, g, None), g.double() @ dense)
    both_x, both_values = implementation.spmm_sddmm(*p.by_col, values, x, g)
    assert both_x.dtype == dtype
    close(both_x, g.double() @ dense)
    for grad_values in (implementation.sddmm(*p.by_row, values.shape[0], g, x), both_values):
        assert grad_values.dtype == torch.float32
        close(grad_values, p.at_slots(g.double().t() @ x.double()), 1e-5)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("batch", BATCHES[1:])
def test_every_number_of_16_bits_is_read_exactly(dtype, batch):
    p = problem(1, 1, 1)
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for x in (
        numbers[::97] if batch == 1 else numbers[: 2**16 // batch * batch].view(-1, batch)[::97]
    ):
        y = ops.spmm(*p.by_row, torch.ones(1), x.view(-1, 1), None).flatten()
        assert torch.equal(y.isnan(), x.view(-1).isnan())
        assert torch.equal(y.nan_to_num(0, 1, -1), x.view(-1).nan_to_num(0, 1, -1))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("batch", [1, 3, 16, 37])
def test_results_are_the_nearest_numbers_of_16_bits(dtype, batch):
    """Ties to even, subnormals, overflow: all as torch converts."""
    rows = 20_000
    p = problem(rows, 1, rows)
    bits = torch.randint(-(2**31), 2**31, (rows,), dtype=torch.int32)
    bits[: rows // 2] &= -(2**12)  # ties
    scale = torch.randint(-30, 20, (rows,))
    values = torch.where(
        torch.arange(rows) % 4 < 3,
        torch.ldexp(1 + (bits & 0x7FFFFF) / 2**23, scale),
        bits.view(torch.float32),
    )
    y = ops.spmm(*p.by_row, values, torch.ones(batch, 1, dtype=dtype), None)
    expected = values[p.by_row[2].long()].to(dtype).expand(batch, rows)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(0.0, 1.0, -1.0), expected.nan_to_num(0.0, 1.0, -1.0))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", [torch.float32, "narrow"])
def test_narrow_gradients(dtype, kind):
    p = problem(30, 40, 300, spare=3)
    values = p.values.to(dtype if kind == "narrow" else kind).requires_grad_()
    bias = torch.randn(30).to(values.dtype).requires_grad_()
    x = torch.randn(50, 40).to(dtype).requires_grad_()
    g = torch.randn(50, 30).to(dtype)
    y = ops.sparse_linear(x, values, bias, p.index)
    gradients = torch.autograd.grad(y, (x, values, bias), g)
    assert [t.dtype for t in (y, *gradients)] == [dtype, dtype, values.dtype, values.dtype]
    dense = p.dense.to(values.dtype).double()
    close(gradients[0], g.double() @ dense)
    close(gradients[1], p.at_slots(g.double().t() @ x.detach().double()))
    close(gradients[2], g.double().sum(0))

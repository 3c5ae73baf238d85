"""Products with frozen weights against dense float64, for every form of the tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interpreter import run_python
from rewire import _native, ops
from rewire.ops.frozen import FrozenLists

native = pytest.mark.skipif(
    not _native.available("frozen_linear"), reason="the C++ extension is not in use"
)
FORMS = ("float", "int8", "ternary")
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def weight(
    rows: int, cols: int, density: float, form: str, seed: int = 0, wide: bool = False
) -> tuple[Parts, Tensor]:
    """The four tensors of a random weight, and the dense matrix in float64; ``wide``: with 64-bit
    pointers and 32-bit columns.
    """
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, cols, generator=g) < density
    mask[:: max(2, rows // 3)] = False  # empty rows
    codes = torch.randint(1, 128, (rows, cols), generator=g)
    codes *= torch.randint(0, 2, (rows, cols), generator=g) * 2 - 1
    scale = torch.rand(rows, generator=g) + 0.1
    values = torch.randn(rows, cols, generator=g)
    if form == "float":
        dense = values.double() * mask
        parts = [(r, r, mask[r]) for r in range(rows)]
    elif form == "int8":
        dense = codes.double() * scale.double()[:, None] * mask
        parts = [(r, r, mask[r]) for r in range(rows)]
    else:
        dense = codes.sign().double() * scale.double()[:, None] * mask
        parts = [
            (r, 2 * r + k, mask[r] & ((codes[r] < 0) == k)) for r in range(rows) for k in (0, 1)
        ]
    found = [(r, there.nonzero().flatten()) for r, _, there in parts]
    ptr = torch.tensor([0, *(len(c) for _, c in found)]).cumsum(0)
    columns = torch.cat([c for _, c in found])
    at = torch.cat([torch.full_like(c, r) for r, c in found])
    kept = {"float": values[at, columns], "int8": codes[at, columns].to(torch.int8)}.get(form)
    tensors = (
        ptr.to(torch.int64 if wide else torch.int32),
        columns.to(torch.int32 if wide else torch.uint16),
        kept,
        None if form == "float" else scale,
    )
    return tensors, dense


def check(parts: Parts, dense: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y = ops.frozen_linear(FrozenLists(*parts), x, bias)
    expected = x.double() @ dense.t() + (0 if bias is None else bias.double())
    size = (x.double().abs() @ dense.abs().t()).clamp(min=1)
    assert y.shape == expected.shape
    assert bool(((y - expected).abs() <= 1e-6 * size).all())
    assert y.is_contiguous()
    return y


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 15, 16, 17, 40, 100]),
    cols=st.sampled_from([1, 3, 16, 33, 70, 300]),
    density=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    batch=st.one_of(st.integers(0, 20), st.sampled_from([31, 33, 48, 63, 64, 65, 130, 200])),
    layout=st.sampled_from(["rows", "features", "steps"]),
    bias=st.booleans(),
    wide=st.booleans(),
)
def test_agrees_with_dense(
    form: str, rows: int, cols: int, density: float, batch: int, layout: str, bias: bool, wide: bool
) -> None:
    parts, dense = weight(rows, cols, density, form, seed=rows * cols, wide=wide)
    x = torch.randn(batch, cols)
    if layout == "features":
        x = x.t().contiguous().t()
    elif layout == "steps":
        x = torch.randn(batch, 2 * cols)[:, ::2]
    check(parts, dense, x, torch.randn(rows) if bias else None)


@pytest.mark.parametrize("form", FORMS)
def test_long_rows_and_many_connections(form: str) -> None:
    parts, dense = weight(3, 5000, 0.8, form)
    for batch in (1, 5, 64):
        check(parts, dense, torch.randn(batch, 5000), None)


@native
@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_for_any_number_of_threads(form: str) -> None:
    parts, dense = weight(700, 500, 0.2, form)
    before = torch.get_num_threads()
    try:
        for batch in (1, 7, 64, 200):
            x, found = torch.randn(batch, 500), []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found.append(check(parts, dense, x, None))
            assert all(torch.equal(found[0], y) for y in found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_the_way_of_training(form: str, dtype: torch.dtype) -> None:
    (ptr, cols, values, scale), dense = weight(20, 30, 0.4, form)
    if form == "float":
        values = None if values is None else values.to(dtype)
    x = torch.randn(6, 30, dtype=dtype)
    lists = FrozenLists(ptr, cols, values, None if scale is None else scale.to(dtype))
    y = ops.frozen_linear(lists, x, None)
    assert y.dtype == dtype
    rough = 1e-10 if dtype == torch.float64 and form == "float" else 3e-2
    torch.testing.assert_close(y.double(), x.double() @ dense.t(), rtol=rough, atol=rough * 300)


@native
@pytest.mark.parametrize("form", FORMS)
def test_expanded_lists_are_the_same_weight(form: str) -> None:
    parts, _ = weight(20, 30, 0.4, form)
    x = torch.randn(5, 30)
    y = ops.spmm(*FrozenLists(*parts).expand(), x)
    torch.testing.assert_close(
        y, ops.frozen_linear(FrozenLists(*parts), x, None), rtol=1e-5, atol=1e-4
    )


@native
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_bad_tensors_raise_and_read_nothing_outside(batch: int) -> None:
    (ptr, cols, values, _), _ = weight(20, 30, 0.4, "float")
    x = torch.randn(batch, 30)

    def refused(message: str, *given: Any) -> None:
        with pytest.raises(RuntimeError, match=message):
            ops.frozen_linear(FrozenLists(*given[:4]), *given[4:])

    for place, wrong in ((3, 10_000), (5, -4), (20, 2**30)):
        bad = ptr.clone()
        bad[place] = wrong
        refused("ptr does not ascend", bad, cols, values, None, x, None)
    for wrong in (30, 65_535):
        bad = cols.to(torch.int32)
        bad[7] = wrong
        refused("a column that x does not have", ptr, bad.to(torch.uint16), values, None, x, None)
        refused("a column that x does not have", ptr, bad, values, None, x, None)
    bad = cols.to(torch.int32)
    bad[7] = -1
    refused("a column that x does not have", ptr, bad, values, None, x, None)
    assert values is not None
    refused("the same length", ptr, cols, values[1:], None, x, None)
    refused("one entry per row", ptr, cols, values, None, x, torch.randn(19))
    refused("scale goes with int8", ptr, cols, values, torch.ones(20), x, None)
    refused("two entries per row", ptr[:-1], cols, None, torch.ones(20), x, None)


AGREE = """
import torch
from test_frozen import FORMS, check, weight
from rewire import _native
for form in FORMS:
    for wide in (False, True):
        parts, dense = weight(50, 70, 0.3, form, wide=wide)
        for batch in (*range(1, 20), 31, 33, 49, 64, 100):
            check(parts, dense, torch.randn(batch, 70), torch.randn(50))
print(_native.instruction_set())
"""


@native
@pytest.mark.parametrize("cap", ["portable", "avx2", "avx512"])
def test_instruction_sets_agree(cap: str) -> None:
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    done = run_python(start + AGREE, REWIRE_CPU_CAPABILITY=cap)
    assert done.returncode == 0, done.stderr
    order = ("portable", "avx2", "avx512")
    assert order.index(done.stdout.strip()) <= order.index(cap)

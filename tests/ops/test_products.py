"""spmm, sddmm, both in one and the layout copies against dense float64, in native code and in the
reference.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interpreter import run_python
from problems import BATCHES, LAYOUTS, in_layout, problem, problems
from rewire import _native, ops
from rewire.ops import reference

native = pytest.mark.skipif(not _native.available("spmm"), reason="the C++ extension is not in use")
IMPLEMENTATIONS = [pytest.param(ops, id="dispatched"), pytest.param(reference, id="reference")]


def check(implementation, p, x, g, bias):
    """Both products in both directions against the dense ones, computed in float64."""
    tolerance = (
        {"rtol": 2e-5, "atol": 2e-5} if x.dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    )
    wide = [t.double() for t in (x, g, p.dense)]
    y = implementation.spmm(*p.by_row, p.values, x, bias)
    expected = wide[0] @ wide[2].t() + (0.0 if bias is None else bias.double())
    torch.testing.assert_close(y.double(), expected, **tolerance)
    assert y.dtype == x.dtype
    assert y.t().is_contiguous()
    grad_x = implementation.spmm(*p.by_col, p.values, g, None)
    torch.testing.assert_close(grad_x.double(), wide[1] @ wide[2], **tolerance)
    grad_values = implementation.sddmm(*p.by_row, p.values.shape[0], g, x)
    scale = max(1.0, x.shape[0] ** 0.5)
    both_x, both_values = implementation.spmm_sddmm(*p.by_col, p.values, x, g)
    torch.testing.assert_close(both_x.double(), wide[1] @ wide[2], **tolerance)
    assert both_x.dtype == x.dtype
    assert both_x.t().is_contiguous()
    for found in (grad_values, both_values):
        torch.testing.assert_close(
            found.double(),
            p.at_slots(wide[1].t() @ wide[0]),
            rtol=tolerance["rtol"],
            atol=tolerance["atol"] * scale,
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=150, deadline=None)
@given(
    p=problems(),
    batch=st.sampled_from(BATCHES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    with_bias=st.booleans(),
)
def test_products_agree_with_dense_ones(implementation, p, batch, layouts, with_bias):
    generator = torch.Generator().manual_seed(1)
    dtype = p.values.dtype
    x = torch.randn(batch, p.shape[1], dtype=dtype, generator=generator)
    g = torch.randn(batch, p.shape[0], dtype=dtype, generator=generator)
    bias = torch.randn(p.shape[0], dtype=dtype, generator=generator) if with_bias else None
    if batch:
        x, g = in_layout(x, layouts[0]), in_layout(g, layouts[1])
    check(implementation, p, x, g, bias)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_batch_size(batch, dtype):
    p = problem(37, 53, 400, spare=3, dtype=dtype)
    check(ops, p, torch.randn(batch, 53, dtype=dtype), torch.randn(batch, 37, dtype=dtype), None)


@pytest.mark.parametrize(
    ("rows", "cols", "connections"),
    [
        (1, 1, 1),
        (1, 1, 0),
        (1, 200, 77),
        (200, 1, 77),
        (1, 200, 200),
        (200, 1, 200),
        (5, 7, 35),
        (30, 30, 0),
    ],
)
def test_extreme_shapes(rows, cols, connections):
    p = problem(rows, cols, connections)
    check(ops, p, torch.randn(10, cols), torch.randn(10, rows), torch.randn(rows))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 50), (50, 1), (10, 300), (17, 129), (130, 67), (0, 5), (5, 0)]
)
def test_layout_copies_are_exact(shape, dtype, layout):
    x = torch.randn(shape, dtype=dtype)
    x = in_layout(x, layout) if x.numel() else x
    for copy, ordered in ((ops.feature_major, lambda t: t.t()), (ops.batch_major, lambda t: t)):
        y = copy(x)
        assert torch.equal(y, x)
        assert ordered(y).is_contiguous()
        assert y.data_ptr() != x.data_ptr() or not x.numel()


def test_infinities_of_the_last_vector_are_counted_once():
    """The kernels read the end of a batch in a vector that overlaps the one before it."""
    p = problem(3, 4, 12)
    for batch in (5, 10, 19, 37):
        x, g = torch.ones(batch, 4), torch.ones(batch, 3)
        x[batch - 3] = float("inf")
        assert torch.isposinf(ops.sddmm(*p.by_row, 12, g, x)).all()
        assert torch.isposinf(ops.spmm_sddmm(*p.by_row, p.values, g, x)[1]).all()


def test_noncontiguous_values_and_bias():
    p = problem(6, 9, 20)
    x, bias = torch.randn(10, 9), torch.randn(12)[::2]
    spread = torch.zeros(40)
    spread[::2] = p.values
    assert torch.equal(
        ops.spmm(*p.by_row, spread[::2], x, bias),
        ops.spmm(*p.by_row, p.values, x, bias.contiguous()),
    )


def test_reference_takes_blocks_of_connections(monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(reference, "_MAX_BLOCKS", 1000)
    p = problem(20, 30, 300, spare=5)
    check(reference, p, torch.randn(10, 30), torch.randn(10, 20), torch.randn(20))


# --- threads, instruction sets --------------------------------------------------------------------


@pytest.mark.parametrize("batch", [10, 128, 300])
def test_threads_change_no_bit(batch):
    p = problem(400, 500, 20_000, skewed=True)
    x, g = torch.randn(batch, 500), torch.randn(batch, 400)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                (
                    ops.spmm(*p.by_row, p.values, x, None),
                    ops.sddmm(*p.by_row, 20_000, g, x),
                    *ops.spmm_sddmm(*p.by_col, p.values, x, g),
                    ops.feature_major(x),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


AGREE = """
import torch
from problems import problem
from rewire import _native, ops
from rewire.ops import reference
print(_native.instruction_set())
for batch in (1, 2, 3, 5, 7, 8, 9, 10, 13, 16, 17, 31, 33, 100, 128, 130, 257):
    tolerances = {torch.float32: 1e-4, torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.half: 1e-3}
    for dtype, tolerance in tolerances.items():
        p = problem(23, 31, 300, spare=2, dtype=dtype)
        x, g = torch.randn(batch, 31, dtype=dtype), torch.randn(batch, 23, dtype=dtype)
        b = torch.randn(23, dtype=dtype)
        for name, arguments in (
            ("spmm", (p.values, x, b)), ("sddmm", (302, g, x)), ("spmm_sddmm", (p.values, g, x))
        ):
            torch.testing.assert_close(
                getattr(ops, name)(*p.by_row, *arguments),
                getattr(reference, name)(*p.by_row, *arguments), rtol=tolerance, atol=tolerance)
        assert torch.equal(ops.feature_major(x), x) and torch.equal(ops.batch_major(x.t()), x.t())
"""


@native
@pytest.mark.parametrize("cap", ["portable", "avx2", "avx512"])
def test_instruction_sets_agree(cap):
    done = run_python(AGREE, REWIRE_CPU_CAPABILITY=cap)
    assert done.returncode == 0, done.stderr
    order = ("portable", "avx2", "avx512")
    assert order.index(done.stdout.strip()) <= order.index(cap)


def test_unknown_capability_is_refused():
    done = run_python(
        "from rewire import _native; _native.available()", REWIRE_CPU_CAPABILITY="sse9"
    )
    assert done.returncode != 0
    assert "'sse9'; allowed are portable, avx2, avx512" in done.stderr


def test_library_can_be_switched_off():
    code = (
        "import warnings; warnings.simplefilter('error'); from rewire import _native as n; "
        "print(n.available(), n.describe())"
    )
    done = run_python(code, REWIRE_NATIVE="0")
    assert done.stdout.strip() == (
        "False plain PyTorch reference (switched off by REWIRE_NATIVE=0)"
    ), done.stderr


def test_a_missing_library_is_warned_about_once():
    code = (
        "import os; os.environ.pop('REWIRE_NATIVE', None)\n"
        "import warnings; from pathlib import Path; from rewire import _native as n; "
        "n._load.cache_clear()\n"
        "n._FOLDER = Path('/nonexistent')\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); n.available(); n.available('spmm')\n"
        "print([w.category.__name__ for w in seen], n.describe())"
    )
    done = run_python(code)
    expected = (
        "['NativeKernelsUnavailable'] plain PyTorch reference (the C++ extension is not built)"
    )
    assert done.stdout.strip() == expected, done.stderr


# --- memory safety --------------------------------------------------------------------------------


def spoiled(p, which, place, value):
    lists = [t.clone() for t in p.by_row]
    lists[which][place] = value
    return lists


@native
@pytest.mark.parametrize("size", [10, 500])  # in the caller's thread, and shared out
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("which", "place", "value", "message"),
    [
        (0, 0, 1, "ptr must start at 0"),
        (0, -1, 10**9, "ptr must end at"),
        (0, -1, -1, "ptr must end at"),
        (0, 4, -7, "ptr must never fall"),
        (0, 4, 2**31 - 1, "ptr must never fall"),
        (1, 3, -1, "outside the features"),
        (1, 3, 2**31 - 1, "outside the features"),
        (2, 3, -1, "outside the capacity"),
        (2, 3, 2**31 - 1, "outside the capacity"),
    ],
)
def test_bad_lists_raise(size, index_dtype, which, place, value, message):
    p = problem(size, size, size * size // 2, index_dtype=index_dtype)
    lists = spoiled(p, which, place, value)
    x = torch.randn(16, size)
    with pytest.raises(RuntimeError, match=message):
        ops.spmm(*lists, p.values, x, None)
    with pytest.raises(RuntimeError, match=message):
        ops.sddmm(*lists, p.values.shape[0], x, x)
    with pytest.raises(RuntimeError, match=message):
        ops.spmm_sddmm(*lists, p.values, x, x)


GEOMETRY = ((1,), (1,), (0, 0), (1,), 1)


@native
@pytest.mark.parametrize("size", [10, 500])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("inner", ["negative", "large", "falling", "last falls"])
def test_rows_are_checked_whatever_ptr_holds(size, index_dtype, inner):
    """The work is shared out by a search in ptr, which must not leave rows out: their results would
    be anything.
    """
    p = problem(size, size, size * size // 2, index_dtype=index_dtype)
    ptr, idx, slots = p.by_row
    x = torch.randn(16, size)
    bad = ptr.clone()
    if inner == "falling":
        bad[1:-1] = ptr[1:-1].flip(0)
    elif inner == "last falls":
        bad[-2] = bad[-1] + 1
    else:
        bad[1:-1] = -1000 if inner == "negative" else torch.iinfo(index_dtype).max
    images, ops_ = x[:, :, None], torch.ops.rewire
    calls = [
        lambda ptr: ops.spmm(ptr, idx, slots, p.values, x, None),
        lambda ptr: ops.sddmm(ptr, idx, slots, p.values.shape[0], x, x),
        lambda ptr: torch.cat(
            [t.flatten() for t in ops.spmm_sddmm(ptr, idx, slots, p.values, x, x)]
        ),
        lambda ptr: ops_.conv(ptr, idx, slots, p.values, images, None, size, *GEOMETRY, False),
        lambda ptr: ops_.conv_input_gradient(
            ptr, idx, slots, p.values, images, (1,), size, *GEOMETRY, False
        ),
        lambda ptr: ops_.conv_value_gradient(
            ptr, idx, slots, p.values.shape[0], images, images, size, *GEOMETRY
        ),
    ]
    for call in calls:
        assert call(ptr).isfinite().all()
        with pytest.raises(RuntimeError, match=r"ptr must .*never fall"):
            call(bad)


@native
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_only_a_rising_ptr_gives_a_result(data):
    rows = data.draw(st.integers(2, 300))
    p = problem(rows, 3, rows)
    ptr, idx, slots = p.by_row
    ptr = ptr.clone()
    for _ in range(data.draw(st.integers(1, 5))):
        ptr[data.draw(st.integers(1, rows - 1))] = data.draw(
            st.integers(-(2**31), 2**31 - 1) | st.integers(0, rows)
        )
    x, g = torch.randn(2, 3), torch.randn(2, rows)
    rising = bool((ptr[1:] >= ptr[:-1]).all())
    for call in (
        lambda: ops.spmm(ptr, idx, slots, p.values, x, None),
        lambda: ops.sddmm(ptr, idx, slots, rows, g, x),
        lambda: ops.spmm_sddmm(ptr, idx, slots, p.values, g, x),
    ):
        with (
            contextlib.nullcontext() if rising else pytest.raises(RuntimeError, match="never fall")
        ):
            call()


@native
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_damage_never_crashes(data):
    p = problem(12, 12, 60, spare=4)
    lists = [t.clone() for t in p.by_row]
    for _ in range(data.draw(st.integers(1, 4))):
        target = data.draw(st.sampled_from(lists))
        target[data.draw(st.integers(0, target.shape[0] - 1))] = data.draw(
            st.integers(-(2**31), 2**31 - 1)
        )
    x = torch.randn(data.draw(st.sampled_from((1, 10, 17))), 12)
    with contextlib.suppress(RuntimeError):
        assert ops.spmm(*lists, p.values, x, None).shape == x.shape
    with contextlib.suppress(RuntimeError):
        assert ops.sddmm(*lists, 64, x, x).shape == (64,)
    with contextlib.suppress(RuntimeError):
        assert [t.shape for t in ops.spmm_sddmm(*lists, p.values, x, x)] == [x.shape, (64,)]


@native
def test_bad_arguments_raise():
    p = problem(4, 5, 9)
    ptr, idx, slots = p.by_row
    x, g = torch.randn(3, 5), torch.randn(3, 4)
    spmm, sddmm, both = torch.ops.rewire.spmm, torch.ops.rewire.sddmm, torch.ops.rewire.spmm_sddmm
    cases = [
        (lambda: spmm(ptr, idx[:-1], slots, p.values, x, None), "same length"),
        (lambda: spmm(ptr.long(), idx, slots, p.values, x, None), "one dtype"),
        (lambda: spmm(ptr.float(), idx, slots, p.values, x, None), "int32 or int64"),
        (lambda: spmm(ptr[:0], idx, slots, p.values, x, None), "one entry more"),
        (lambda: spmm(ptr[None], idx, slots, p.values, x, None), "one dimension"),
        (
            lambda: spmm(ptr, idx, slots, p.values.double(), x, None),
            "values and x must have one dtype",
        ),
        (lambda: spmm(ptr, idx, slots, p.values[None], x, None), "values must have one dimension"),
        (lambda: spmm(ptr, idx, slots, p.values, x[0], None), "two dimensions"),
        (
            lambda: spmm(ptr, idx, slots, p.values.double(), x.half(), None),
            "values and x must have one dtype",
        ),
        (
            lambda: spmm(ptr, idx, slots, p.values.bfloat16(), x.half(), None),
            "values and x must have one dtype",
        ),
        (lambda: spmm(ptr, idx, slots, p.values, x.half(), torch.zeros(4).double()), "bias and x"),
        (
            lambda: spmm(ptr, idx, slots, p.values, x.int(), None),
            "float32, float64, bfloat16 or float16",
        ),
        (lambda: sddmm(ptr, idx, slots, 9, g, x.half()), "g and x must have one dtype"),
        (lambda: spmm(ptr, idx, slots, p.values, x, torch.zeros(5)), "one entry per row"),
        (lambda: spmm(ptr, idx, slots, p.values, x, torch.zeros(4).double()), "bias and x"),
        (lambda: sddmm(ptr, idx, slots, 9, g[:2], x), "same batch size"),
        (lambda: sddmm(ptr, idx, slots, 9, x, x), "as many features as there are rows"),
        (lambda: sddmm(ptr, idx, slots, -1, g, x), "capacity must not be negative"),
        (lambda: sddmm(ptr, idx, slots, 9, g.double(), x), "g and x must have one dtype"),
        (
            lambda: both(ptr, idx, slots, p.values.double(), g, x),
            "values and x must have one dtype",
        ),
        (lambda: both(ptr, idx, slots, p.values, g.double(), x), "g and x must have one dtype"),
        (lambda: both(ptr, idx, slots, p.values[None], g, x), "values must have one dimension"),
        (lambda: both(ptr, idx, slots, p.values, g[:2], x), "same batch size"),
        (lambda: both(ptr, idx, slots, p.values, x, x), "as many features as there are rows"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


# --- what the compiler is told --------------------------------------------------------------------


@native
@pytest.mark.parametrize("layout", ["row-major", "feature-major", "expanded both"])
@pytest.mark.parametrize("batch", [1, 10])
def test_fake_kernels_match(layout, batch):
    p = problem(6, 7, 20, spare=2)
    x, g = (in_layout(torch.randn(batch, n), layout) for n in (7, 6))
    check_op = torch.library.opcheck
    check_op(torch.ops.rewire.spmm.default, (*p.by_row, p.values, x, None))
    check_op(torch.ops.rewire.spmm.default, (*p.by_row, p.values, x, torch.randn(6)))
    check_op(torch.ops.rewire.sddmm.default, (*p.by_row, 22, g, x))
    for kind in (torch.bfloat16, torch.float32):
        check_op(torch.ops.rewire.spmm.default, (*p.by_row, p.values.to(kind), x.bfloat16(), None))
    check_op(torch.ops.rewire.sddmm.default, (*p.by_row, 22, g.half(), x.half()))
    for one, other in ((g, x), (g.half(), x.half())):
        check_op(torch.ops.rewire.spmm_sddmm.default, (*p.by_row, p.values, one, other))
    check_op(torch.ops.rewire.feature_major.default, (x,))
    check_op(torch.ops.rewire.batch_major.default, (x,))

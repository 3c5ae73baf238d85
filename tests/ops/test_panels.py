"""Products of many rows, panel by panel: against dense float64 and themselves on other threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interpreter import run_python
from problems import BATCHES, LAYOUTS, Problem, close, in_layout, problem, problems
from rewire import _native, ops
from rewire.nn import SparseLinear, SparseLSTM, SparseMultiheadAttention
from rewire.ops import kernels, sparse_linear

native = pytest.mark.skipif(not _native.available("spmm"), reason="the C++ extension is not in use")

#: Many rows, the last panel of them an incomplete one.
MANY = kernels.PANEL_ROWS + 75


def products(p: Problem, values: Tensor, x: Tensor, g: Tensor, bias: Tensor) -> list[Tensor]:
    """y, its input gradient and twice the gradient of the values."""
    y = kernels.spmm(*p.by_row, values, x, bias, panels=True)
    grad_x, both = kernels.spmm_sddmm(*p.by_col, values, x, g, panels=True)
    alone = kernels.sddmm(*p.by_row, values.shape[0], g, x, panels=True)
    in_runs = kernels.spmm(*p.by_row, values, x, bias, panels=True, runs=True)
    assert in_runs.stride() == (1, x.shape[0]) or min(y.shape) < 2
    assert torch.equal(in_runs, y)
    return [y, grad_x, both, alone]


def check(p: Problem, x: Tensor, g: Tensor, tolerance: float) -> None:
    bias = torch.randn(p.shape[0], dtype=p.values.dtype)
    y, grad_x, both, alone = products(p, p.values, x, g, bias)
    dense, wide_x, wide_g = p.dense.double(), x.double(), g.double()
    assert y.is_contiguous()
    assert grad_x.is_contiguous()
    close(y, wide_x @ dense.t() + bias.double(), tolerance)
    close(grad_x, wide_g @ dense, tolerance)
    for found in (both, alone):
        close(found, p.at_slots(wide_g.t() @ wide_x), min(tolerance, 1e-5))


TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@native
@settings(max_examples=150, deadline=None)
@given(
    p=problems(),
    batch=st.sampled_from(BATCHES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
def test_agree_with_dense(p: Problem, batch: int, layouts: Sequence[str]) -> None:
    """Any sizes and strides."""
    sides = (torch.randn(batch, n, dtype=p.values.dtype) for n in reversed(p.shape))
    x, g = (in_layout(t, layout) if batch else t for t, layout in zip(sides, layouts, strict=True))
    check(p, x, g, TOLERANCES[p.values.dtype])


@native
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(190, 75), (3, 2500), (2100, 5), (1, 1)])
def test_dtypes_and_widths(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Several pieces of rows, the last a longer one; and so many features that panels are
    narrower.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    connections = shape[0] * shape[1] // 3 + 1
    p = problem(*shape, connections, spare=3, dtype=wide, skewed=shape == (190, 75))
    check(
        p, torch.randn(MANY, shape[1]).to(dtype), torch.randn(MANY, shape[0]).to(dtype),
        TOLERANCES[dtype],
    )  # fmt: skip


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [MANY, 2300])
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype, batch: int) -> None:
    """More threads than groups of panels share out rows too."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    p = problem(300, 200, 2000, spare=5, dtype=wide)
    x, g = torch.randn(batch, 200).to(dtype), torch.randn(batch, 300).to(dtype)
    bias = torch.randn(300, dtype=wide)
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            results.append(products(p, p.values, x, g, bias))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@native
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("which", "place", "value", "message"),
    [
        (0, -1, 10**9, "ptr must end at"),
        (0, 4, -7, "ptr must never fall"),
        (0, 4, 2**31 - 1, "ptr must never fall"),
        (1, 3, -1, "outside the features"),
        (1, -9, 2**31 - 1, "outside the features"),
        (2, 3, -1, "outside the capacity"),
        (2, -9, 2**31 - 1, "outside the capacity"),
    ],
)
def test_bad_lists_raise(
    index_dtype: torch.dtype, which: int, place: int, value: int, message: str
) -> None:
    p = problem(300, 300, 40_000, index_dtype=index_dtype)
    lists = [t.clone() for t in p.by_row]
    lists[which][place] = value
    x = torch.randn(150, 300)
    for call in (
        lambda: kernels.spmm(*lists, p.values, x, None, True),
        lambda: kernels.sddmm(*lists, p.values.shape[0], x, x, True),
        lambda: kernels.spmm_sddmm(*lists, p.values, x, x, True),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@native
def test_fake_kernels_match() -> None:
    p = problem(6, 7, 20, spare=2)
    x, g = torch.randn(10, 7), torch.randn(10, 6)
    check_op = torch.library.opcheck
    check_op(torch.ops.rewire.spmm.default, (*p.by_row, p.values, x, None, True))
    check_op(torch.ops.rewire.sddmm.default, (*p.by_row, 22, g, x, True))
    check_op(torch.ops.rewire.spmm_sddmm.default, (*p.by_row, p.values, g, x, True))


AGREE = """
import torch
from problems import problem
from test_panels import check
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-2),
                         (torch.float16, 2e-3)):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for batch in (1, 3, 17, 63, 300):
        p = problem(75, 140, 900, spare=2, dtype=wide)
        check(p, torch.randn(batch, 140).to(dtype), torch.randn(batch, 75).to(dtype), tolerance)
"""


@native
@pytest.mark.parametrize("cap", ["portable", "avx2", "avx512"])
def test_instruction_sets(cap: str) -> None:
    done = run_python(f"import sys; sys.path.append({__file__.rpartition('/')[0]!r})" + AGREE,
                      REWIRE_CPU_CAPABILITY=cap)  # fmt: skip
    assert done.returncode == 0, done.stderr


# --- the differentiable product -------------------------------------------------------------------


@native
def test_rows_stay_rows_and_nothing_is_copied() -> None:
    p = problem(40, 30, 300)
    x = torch.randn(MANY, 30, requires_grad=True)
    values = p.values.clone().requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = sparse_linear(x, values, None, p.index)
    assert y.is_contiguous()
    activations = [t for t in saved if t.dim() == 2]
    assert [t.data_ptr() for t in activations] == [x.data_ptr()]
    gradient, _ = torch.autograd.grad(y, (x, values), torch.randn(MANY, 40).t().contiguous().t())
    assert gradient.is_contiguous()


@native
@pytest.mark.parametrize("lead", [(MANY,), (MANY, 1), (7, MANY)])
@pytest.mark.parametrize("contiguous_output", [False, True])
def test_agrees_with_a_dense_layer(lead: tuple[int, ...], contiguous_output: bool) -> None:
    p = problem(6, 9, 25, spare=3, dtype=torch.float64)
    x = torch.randn(*lead, 9, dtype=torch.float64, requires_grad=True)
    values, bias = p.values.clone().requires_grad_(), torch.randn(6, dtype=torch.float64)
    bias.requires_grad_()
    dense = p.dense.clone().requires_grad_()
    y = sparse_linear(x, values, bias, p.index, contiguous_output=contiguous_output)
    expected = torch.nn.functional.linear(x, dense, bias)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(expected)
    found = torch.autograd.grad(y, (x, values, bias), g)
    wanted = torch.autograd.grad(expected, (x, dense, bias), g)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], p.at_slots(wanted[1]))
    torch.testing.assert_close(found[2], wanted[2])


@native
def test_gradients_of_second_order() -> None:
    p = problem(5, 7, 12, spare=1, dtype=torch.float64)
    x = torch.randn(MANY, 7, dtype=torch.float64, requires_grad=True)
    values, dense = p.values.clone().requires_grad_(), p.dense.clone().requires_grad_()

    def slopes(product: Callable[[], Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad((product() ** 3).mean(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum((t**2).sum() for t in first), (x, weight))

    found = slopes(lambda: sparse_linear(x, values, None, p.index), values)
    # Only connections count: what the dense weight's other positions would have is masked out.
    mask = (p.dense != 0).double()
    wanted = slopes(lambda: torch.nn.functional.linear(x, dense * mask), dense)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], p.at_slots(wanted[1]))


@native
def test_capture() -> None:
    p = problem(6, 9, 25)
    x, g = torch.randn(MANY, 9), torch.randn(MANY, 6)
    capture: list[ops.Pair] = []
    values = p.values.clone().requires_grad_()
    torch.autograd.grad(sparse_linear(x, values, None, p.index, capture), values, g)
    (pair,) = capture
    close(pair.block(0, 6), g.double().t() @ x.double(), 1e-5)
    close(pair.at(p.index, 25), p.at_slots(g.double().t() @ x.double()), 1e-5)


@native
@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_layers_of_sequences(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that keep activations in layouts of their own give the same with panels."""
    torch.manual_seed(0)
    layer: torch.nn.Module
    if kind == "lstm":
        layer = SparseLSTM(20, 12, num_layers=2, density=0.4, proj_size=5, dtype=torch.float64)
    else:
        layer = SparseMultiheadAttention(20, 4, density=0.4, dtype=torch.float64)
    x = torch.randn(9, 7, 20, dtype=torch.float64, requires_grad=True)
    inputs = (x,) if kind == "lstm" else (x, x, x)
    results = []
    for rows in (10**9, 2):
        monkeypatch.setattr(kernels, "PANEL_ROWS", rows)
        y = layer(*inputs)[0]
        found = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()), create_graph=True)
        twice = torch.autograd.grad(sum(t.square().sum() for t in found), x)
        plain = torch.autograd.grad(layer(*inputs)[0].square().sum(), (x, *layer.parameters()))
        results.append((y, *found, *twice, *plain))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


# torch's compiler calls what torch deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic: bool) -> None:
    torch._dynamo.reset()
    p = problem(12, 9, 40)
    values = p.values.clone().requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return torch.relu(sparse_linear(x, values, None, p.index))

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (10, MANY):
        x = torch.randn(batch, 9, requires_grad=True)
        for a, e in zip(
            *(
                (y, *torch.autograd.grad(y.square().sum(), (x, values)))
                for y in (compiled(x), layer(x))
            ),
            strict=True,
        ):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    assert compiled(x).is_contiguous() is not dynamic


@pytest.mark.parametrize("batch", [kernels.PANEL_ROWS + more for more in (-1, 0, 1)])
def test_on_both_sides_of_the_first_panel(batch: int) -> None:
    """A layer is its dense twin just below, at and just above the number of rows."""
    layer = SparseLinear(20, 30, density=0.2, dtype=torch.float64)
    x = torch.randn(batch, 20, dtype=torch.float64, requires_grad=True)
    g = torch.randn(batch, 30, dtype=torch.float64)
    weight = layer.weight.to_dense().detach().requires_grad_()
    assert layer.bias is not None
    expected = torch.nn.functional.linear(x, weight, layer.bias)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    mine = torch.autograd.grad(y, (x, layer.weight.values), g)
    theirs = torch.autograd.grad(expected, (x, weight), g)
    rows, cols, _ = layer.weight.coo()
    torch.testing.assert_close(mine[0], theirs[0])
    torch.testing.assert_close(mine[1][layer.weight.active()], theirs[1][rows, cols])


def test_inputs_that_change_after_forward_are_noticed() -> None:
    """Backward reads x itself, as that of `nn.Linear` does."""
    for layer in (SparseLinear(20, 30, density=0.2), torch.nn.Linear(20, 30)):
        x = torch.randn(MANY, 20)
        y = layer(x)
        x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

"""Sparse convolutions: equal to their torch.nn twins on `to_dense()`, on native kernels and on the
reference.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rewire import _native
from rewire.nn import SparseConv1d, SparseConv2d, SparseConv3d, SparseWeight, densify
from rewire.ops import conv_kernels, sparse_conv
from rewire.topology import Index

SPARSE = {1: SparseConv1d, 2: SparseConv2d, 3: SparseConv3d}
native = pytest.mark.skipif(not _native.available("conv"), reason="needs the native kernels")


def make(
    rank: int, inputs: int, outputs: int, kernel: Any, *, density: float = 0.4, **settings: Any
) -> Any:
    sizes = kernel if isinstance(kernel, tuple) else (kernel,) * rank
    potential = outputs * (inputs // settings.get("groups", 1)) * math.prod(sizes)
    connections = max(1, int(density * potential))
    capacity = min(potential, connections + 3)
    return SPARSE[rank](
        inputs, outputs, kernel, connections=connections, capacity=capacity, **settings
    )


def agree(mine: Tensor, truth: Tensor) -> None:
    """To 1e-5 (float32) or 1e-12 (float64) of the largest entry of the float64 truth."""
    assert mine.shape == truth.shape
    scale = truth.abs().max().item() if truth.numel() else 1.0
    bound = (1e-5 if mine.dtype == torch.float32 else 1e-12) * max(scale, 1.0)
    torch.testing.assert_close(mine.double(), truth, rtol=0, atol=bound)


def check(layer: Any, x: Tensor, g: Tensor | None = None) -> None:
    """Output and all gradients are those of the dense twin."""
    dense = densify(copy.deepcopy(layer)).double()
    mine, theirs = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    y, expected = layer(mine), dense(theirs)
    agree(y, expected)
    assert y.dtype == x.dtype
    g = torch.randn_like(y) if g is None else g
    y.backward(g)
    expected.backward(g.double())
    agree(mine.grad, theirs.grad)
    weight = layer.weight
    active = weight.rows >= 0
    matrix = dense.weight.grad.reshape(weight.matrix_shape)
    agree(
        weight.values.grad[active], matrix[weight.rows[active].long(), weight.cols[active].long()]
    )
    assert not weight.values.grad[~active].any()
    if layer.bias is not None:
        agree(layer.bias.grad, dense.bias.grad)


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_kernels, "_NATIVE", False)


@pytest.fixture(params=["dispatched", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        use_reference(monkeypatch)
    return str(request.param)


@st.composite
def problems(draw: Any) -> tuple[int, dict[str, Any], tuple[int, ...], int, bool]:
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    each = lambda *choices: tuple(draw(st.sampled_from(choices)) for _ in range(rank))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel, dilation = each(1, 2, 3, 5), each(1, 1, 2)
    padding: Any = draw(st.sampled_from(["numbers", "numbers", "same", "valid"]))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    stride = (1,) * rank if padding == "same" else each(1, 1, 2, 3)
    if padding == "numbers":
        padding = each(0, 1, 2)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = tuple(max(n, r) for n, r in zip(each(5, 7, 12), reach, strict=True))
    settings = {
        "inputs": groups * draw(st.sampled_from([1, 2, 5])),
        "outputs": groups * draw(st.sampled_from([1, 3, 18])),
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "padding_mode": mode,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
    }
    return (
        rank,
        settings,
        sizes,
        draw(st.sampled_from([0, 1, 2, 5, 16, 20, 33])),
        draw(st.booleans()),
    )


def input_for(
    settings: dict[str, Any], sizes: tuple[int, ...], batch: int, channels_last: bool
) -> Tensor:
    x = torch.randn(batch, settings["inputs"], *sizes, dtype=settings["dtype"])
    if channels_last and x.dim() > 3:
        x = x.contiguous(
            memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        )
    return x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of the twin
@given(problems())
def test_agrees_with_its_twin(problem: Any) -> None:
    rank, settings, sizes, batch, channels_last = problem
    check(make(rank, **settings), input_for(settings, sizes, batch, channels_last))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of the twin
@given(problems())
def test_reference_agrees_with_its_twin(problem: Any) -> None:
    rank, settings, sizes, batch, channels_last = problem
    with pytest.MonkeyPatch.context() as patch:
        use_reference(patch)
        check(make(rank, **settings), input_for(settings, sizes, min(batch, 5), channels_last))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("layout", ["sliced", "expanded", "batch innermost", "channels-last slice"])
def test_any_strides_of_input_and_gradient(rank: int, layout: str) -> None:
    layer = make(rank, 4, 6, 3, padding=1, dtype=torch.float64)

    def strided(channels: int) -> Tensor:
        shape = (5, channels, *(6,) * rank)
        if layout == "sliced":
            return torch.randn(5, channels, *(12,) * rank, dtype=torch.float64)[
                (..., *(slice(None, None, 2),) * rank)
            ]
        if layout == "expanded":
            return torch.randn(1, channels, *(1,) * rank, dtype=torch.float64).expand(shape)
        if layout == "batch innermost":
            return torch.randn(*shape[1:], 5, dtype=torch.float64).movedim(-1, 0)
        return torch.randn(5, *shape[2:], channels + 2, dtype=torch.float64)[
            ..., :channels
        ].movedim(-1, 1)

    check(layer, strided(4), strided(6))


def test_memory_formats() -> None:
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    layer = make(2, 3, 6, 3, padding=1)
    y = layer(x)
    assert y.is_contiguous()
    assert torch.relu_(y) is y  # no view, so in-place activations work
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(y.sum(), last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_unbatched(rank: int) -> None:
    layer = make(rank, 2, 4, 3, padding=1, padding_mode="circular")
    x = torch.randn(2, *(5,) * rank)
    assert torch.equal(layer(x), layer(x.unsqueeze(0)).squeeze(0))
    check(layer, x)


@native
@pytest.mark.parametrize(
    ("rank", "inputs", "sizes", "batch"),
    [
        (1, 40, (3000,), 17),
        (2, 64, (9, 70), 33),
        (2, 130, (4, 4), 70),
        (2, 5, (1, 1), 300),
        (3, 40, (5, 20, 40), 16),
    ],
)
def test_sizes_that_are_tiled(rank: int, inputs: int, sizes: tuple[int, ...], batch: int) -> None:
    for settings in ({}, {"stride": 2}):
        check(
            make(rank, inputs, 7, 3, padding=1, density=0.05, **settings),
            torch.randn(batch, inputs, *sizes),
        )


@native
@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_do_not_change_a_bit(channels_last: bool) -> None:
    layer = make(2, 32, 48, 3, padding=1, stride=(2, 1), density=0.1)
    x = torch.randn(37, 32, 17, 13)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            a = x.detach().requires_grad_()
            y = layer(a)
            results.append(
                (y, *torch.autograd.grad((y * y.detach()).sum(), [a, layer.weight.values]))
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(
    "settings", [{"padding": 1}, {"stride": 2, "dilation": 2, "padding": 2, "groups": 2}]
)
def test_gradients_of_first_and_second_order(settings: dict[str, Any]) -> None:
    layer = make(2, 2, 4, 3, dtype=torch.float64, **settings)
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return sparse_conv(x, values, bias, layer.weight.index, layer._geometry)

    arguments = (x, layer.weight.values, layer.bias)
    assert torch.autograd.gradcheck(product, arguments)
    assert torch.autograd.gradgradcheck(product, arguments)


@pytest.mark.parametrize("what", ["values", "row_cols", "col_slots", "x"])
def test_a_change_between_forward_and_backward_raises(what: str) -> None:
    layer = make(2, 3, 4, 3)
    x = torch.randn(2, 3, 5, 5)
    y = layer(x)
    changed = {"values": layer.weight.values, "x": x}.get(what)
    with torch.no_grad():
        (getattr(layer.weight, what) if changed is None else changed).add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_capture(create_graph: bool) -> None:
    layer = make(2, 3, 4, 3)
    layer.weight.capture = []
    x, g = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 3, 3)
    for _ in range(2):
        torch.autograd.grad(layer(x), layer.weight.values, g, create_graph=create_graph)
    assert len(layer.weight.capture) == 2
    for pair in layer.weight.capture:
        kept_x, kept_g = pair.x, pair.g
        assert torch.equal(kept_x, x)
        assert torch.equal(kept_g, g)
        assert not kept_x.requires_grad
        assert not kept_g.requires_grad


# --- the module -----------------------------------------------------------------------------------


def test_state_dict_and_deepcopy() -> None:
    layer, other = (make(2, 4, 6, 3, padding=1) for _ in range(2))
    x = torch.randn(2, 4, 5, 5)
    assert set(layer.state_dict()) == {
        "bias",
        "weight.values",
        "weight.rows",
        "weight.cols",
        "weight.shape",
    }
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.values.zero_()
    assert not torch.equal(twin(x), layer(x))
    with pytest.raises(RuntimeError, match="saved with shape"):
        make(2, 4, 6, (1, 3)).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"weight is dense.*rewire\.sparsify"):
        layer.load_state_dict(nn.Conv2d(4, 6, 3).state_dict())


def test_same_generator_same_layer() -> None:
    one, two = (make(3, 4, 6, 3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )


def test_from_weight() -> None:
    weight = SparseWeight((6, 2, 3), connections=9)
    bias = torch.randn(6)
    layer = SparseConv1d.from_weight(weight, bias, stride=2, padding="valid", groups=2)
    assert layer.weight is weight
    assert layer.in_channels == 4
    assert torch.equal(layer.bias, bias)
    check(layer, torch.randn(2, 4, 9))
    with pytest.raises(ValueError, match="needs a 4-D weight"):
        SparseConv2d.from_weight(weight)
    with pytest.raises(ValueError, match="bias must have shape"):
        SparseConv1d.from_weight(weight, torch.randn(5))


def test_autocast_narrows_the_result_only() -> None:
    layer = make(2, 3, 4, 3)
    x = torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x).bfloat16())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 3}, "groups must be at least 1 and divide"),
        ({"padding": "full"}, "'same' or 'valid'"),
        ({"padding": "same", "stride": 2}, "needs stride 1"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of"),
        ({"stride": 0}, "stride must be"),
        ({"dilation": (1, 1, 1)}, "dilation must be"),
    ],
)
def test_bad_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConv2d(4, 6, 3, density=0.5, **settings)


def test_bad_inputs_are_refused() -> None:
    layer = make(2, 4, 6, 3)
    for shape in ((2, 3, 5, 5), (4, 5), (2, 2, 4, 5, 5)):
        with pytest.raises(RuntimeError, match="takes"):
            layer(torch.randn(shape))
    with pytest.raises(RuntimeError, match="larger than the padded input"):
        layer(torch.randn(2, 4, 2, 5))
    with pytest.raises(
        RuntimeError,
        match=r"x is torch.float64 but the weight's values are "
        r"torch.float32",
    ):
        layer(torch.randn(2, 4, 5, 5).double())


@native
@pytest.mark.parametrize(
    "name", ["row_ptr", "row_cols", "row_slots", "col_ptr", "col_rows", "col_slots"]
)
@pytest.mark.parametrize("bad", [-1, 10_000])
@pytest.mark.parametrize("groups", [1, 2])
def test_corrupt_indices_raise(name: str, bad: int, groups: int) -> None:
    layer = make(2, 4, 6, 3, groups=groups)
    lists = layer.weight.index._asdict()
    lists[name] = lists[name].clone()
    lists[name][3] = bad
    x, g, values = torch.randn(2, 4, 5, 5), torch.randn(2, 6, 3, 3), layer.weight.values.detach()
    by_row, by_col = Index(**lists).by_row, Index(**lists).by_col
    geometry = layer._geometry
    if name.startswith("row"):
        calls = [
            lambda: conv_kernels.conv(by_row, values, x, None, geometry, False),
            lambda: conv_kernels.conv_value_gradient(by_row, values.numel(), g, x, geometry),
        ]
    else:
        calls = [
            lambda: conv_kernels.conv_input_gradient(by_col, values, g, (5, 5), 4, geometry, False)
        ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"ptr must start|outside"):
            call()

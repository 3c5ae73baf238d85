"""The differentiable product: against dense autograd, of any order, compiled and exported."""

from __future__ import annotations

import pytest
import torch

from problems import in_layout, problem
from rewire.ops import linear as linear_module
from rewire.ops import reference, sparse_linear


@pytest.fixture(params=["dispatched", "reference"])
def implementation(request, monkeypatch):
    if request.param == "reference":
        for name, count in (("spmm", 6), ("sddmm", 6), ("feature_major", 1), ("batch_major", 1)):
            function = getattr(reference, name)
            # The reference has one way to compute a product: what comes behind says which.
            monkeypatch.setattr(
                linear_module,
                name,
                lambda *a, f=function, n=count: f(*a[:n], *(None,) * (n - len(a))),
            )
    return request.param


def leaves(p, batch=(10,), dtype=torch.float64, bias=True):
    x = torch.randn(*batch, p.shape[1], dtype=dtype, requires_grad=True)
    values = p.values.to(dtype).clone().requires_grad_()
    b = torch.randn(p.shape[0], dtype=dtype, requires_grad=True) if bias else None
    return x, values, b


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("contiguous_output", [False, True])
@pytest.mark.parametrize("batch", [(10,), (1,), (0,), (2, 3), (2, 1, 3), ()])
@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_a_dense_layer(batch, bias, contiguous_output):
    p = problem(6, 9, 25, spare=3, dtype=torch.float64)
    x, values, b = leaves(p, batch, bias=bias)
    y = sparse_linear(x, values, b, p.index, contiguous_output=contiguous_output)
    dense = p.dense.clone().requires_grad_()
    xd = x.detach().clone().requires_grad_()
    bd = b.detach().clone().requires_grad_() if b is not None else None
    expected = torch.nn.functional.linear(xd, dense, bd)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(expected)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(x.grad, xd.grad)
    torch.testing.assert_close(values.grad, p.at_slots(dense.grad))
    assert values.grad.shape == values.shape
    if b is not None:
        torch.testing.assert_close(b.grad, bd.grad)
    if contiguous_output:
        assert y.is_contiguous()


@pytest.mark.parametrize(
    "layout", ["row-major", "feature-major", "sliced", "expanded batch", "expanded both"]
)
def test_any_strides_of_the_gradient(layout):
    p = problem(6, 9, 25, dtype=torch.float64)
    g = in_layout(torch.randn(10, 6, dtype=torch.float64), layout)
    x, values, b = leaves(p)
    sparse_linear(x, values, b, p.index).backward(g)
    torch.testing.assert_close(x.grad, g @ p.dense)
    torch.testing.assert_close(values.grad, p.at_slots(g.t() @ x.detach()))
    torch.testing.assert_close(b.grad, g.sum(0))


def test_layouts_of_results():
    p = problem(6, 9, 25)
    x = torch.randn(10, 9, requires_grad=True)
    y = sparse_linear(x, p.values, None, p.index)
    assert y.stride() == (1, 10)
    assert torch.relu_(y) is y  # owns its memory: no view, so in-place activations work
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.stride() == (1, 10)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_needed_gradients(needed, monkeypatch):
    p = problem(6, 9, 25)
    called = []
    for name in ("spmm", "sddmm"):
        original = getattr(linear_module, name)
        monkeypatch.setattr(
            linear_module, name, lambda *a, f=original, n=name: (called.append(n), f(*a))[1]
        )
    tensors = [
        t.requires_grad_(n)
        for t, n in zip((torch.randn(4, 9), p.values, torch.randn(6)), needed, strict=True)
    ]
    y = sparse_linear(*tensors, p.index)
    called.clear()
    y.sum().backward()
    assert called == ["spmm"] * needed[0] + ["sddmm"] * needed[1]
    assert [t.grad is not None for t in tensors] == list(needed)


@pytest.mark.usefixtures("implementation")
def test_gradients_of_first_and_second_order():
    p = problem(3, 4, 7, spare=1, dtype=torch.float64)
    x, values, b = leaves(p, (3,))

    def product(x, values, b):
        return sparse_linear(x, values, b, p.index)

    # A value in an empty slot has no effect and no gradient.
    assert torch.autograd.gradcheck(product, (x, values, b))
    assert torch.autograd.gradgradcheck(product, (x, values, b))


def test_third_order():
    p = problem(2, 3, 4, dtype=torch.float64)
    x, values, _ = leaves(p, (2,))

    def slope(x, values):
        y = sparse_linear(x, values, None, p.index)
        return torch.autograd.grad((y**3).sum(), (x, values), create_graph=True)

    assert torch.autograd.gradgradcheck(slope, (x, values))


@pytest.mark.parametrize("changed", ["values", "row_cols", "col_slots", "row_ptr"])
def test_a_change_between_forward_and_backward_raises(changed):
    p = problem(6, 9, 25)
    values = p.values.clone().requires_grad_()
    y = sparse_linear(torch.randn(4, 9, requires_grad=True), values, None, p.index)
    with torch.no_grad():
        (values if changed == "values" else getattr(p.index, changed)).add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_capture(create_graph):
    p = problem(6, 9, 25)
    capture = []
    x, g = torch.randn(10, 9), torch.randn(10, 6)
    values = p.values.clone().requires_grad_()
    for _ in range(2):
        y = sparse_linear(x, values, None, p.index, capture)
        torch.autograd.grad(y, values, g, create_graph=create_graph)
    assert len(capture) == 2
    for pair in capture:
        kept_x, kept_g = pair.x, pair.g
        assert torch.equal(kept_x, x)
        assert torch.equal(kept_g, g)
        assert kept_x.stride() == kept_g.stride() == (1, 10)
        assert not kept_x.requires_grad
        assert not kept_g.requires_grad


def test_errors_say_what_is_wrong():
    p = problem(6, 9, 25)
    with pytest.raises(
        RuntimeError,
        match=r"x is torch.float64 but the weight's values are "
        r"torch.float32",
    ):
        sparse_linear(torch.randn(4, 9).double(), p.values, None, p.index)
    for shape in ((4, 8), (9, 4), ()):
        with pytest.raises(RuntimeError, match=r"the layer takes \(\.\.\., 9\)"):
            sparse_linear(torch.randn(shape), p.values, None, p.index)


# --- compiled, exported ---------------------------------------------------------------------------


# torch's compiler calls what torch deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("implementation")
def test_compiles():
    torch._dynamo.reset()
    first, second = problem(12, 9, 40), problem(5, 12, 30, seed=1)
    v1, v2 = (p.values.clone().requires_grad_() for p in (first, second))
    b = torch.randn(12, requires_grad=True)

    def net(x):
        hidden = torch.relu(sparse_linear(x, v1, b, first.index))
        return sparse_linear(hidden, v2, None, second.index)

    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (10, 7, 128):
        x = torch.randn(batch, 9, requires_grad=True)
        for function in (net, compiled):
            y = function(x)
            gradients = torch.autograd.grad(y.square().sum(), (x, v1, v2, b))
            if function is net:
                expected = (y, *gradients)
        for a, e in zip((y, *gradients), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


class Layer(torch.nn.Module):
    def __init__(self, p):
        super().__init__()
        self.values = torch.nn.Parameter(p.values)
        self.lists = p.index
        for name, tensor in p.index._asdict().items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        index = type(self.lists)(*(getattr(self, name) for name in self.lists._fields))
        return sparse_linear(x, self.values, None, index)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exports_with_a_dynamic_batch():
    p = problem(6, 9, 25)
    layer = Layer(p)
    batch = torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(layer, (torch.randn(10, 9),), dynamic_shapes=({0: batch},))
    x = torch.randn(33, 9)
    torch.testing.assert_close(program.module()(x), x @ p.dense.t(), rtol=1e-4, atol=1e-4)


def test_gradients_one_after_the_other_are_the_same(monkeypatch):
    p = problem(30, 40, 300, spare=3)
    x, g = torch.randn(9, 40).requires_grad_(), torch.randn(9, 30)
    values = p.values.clone().requires_grad_()

    def gradients():
        return torch.autograd.grad(sparse_linear(x, values, None, p.index), (x, values), g)

    together = gradients()
    monkeypatch.setattr(linear_module, "_MANY", 0)
    monkeypatch.setattr(linear_module, "spmm_sddmm", None)  # is not called
    for one, other in zip(together, gradients(), strict=True):
        torch.testing.assert_close(one, other)

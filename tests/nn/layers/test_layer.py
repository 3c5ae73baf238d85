"""SparseLinear against `torch.nn.Linear` on the same weight, and as a citizen of PyTorch."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from rewire import ops
from rewire.nn import SparseLinear, param_groups

DTYPES = [torch.float32, torch.float64]


def make(dtype: torch.dtype = torch.float32, bias: bool = True, **more: Any) -> SparseLinear:
    """20 -> 30 with a third of the connections, a spare slot or two, and empty rows and columns."""
    layer = SparseLinear(20, 30, bias, dtype=dtype, connections=200, capacity=203, **more)
    gone = ((layer.weight.rows == 3) | (layer.weight.cols == 5)).nonzero().flatten()
    layer.weight.rewire(gone, torch.full_like(gone, -1), torch.full_like(gone, -1))
    return layer


def same_as_dense(
    layer: SparseLinear, dense: nn.Linear, x: Tensor, g: Tensor | None = None
) -> None:
    """Outputs and all gradients."""
    mine, theirs = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    for module in (layer, dense):
        module.zero_grad()
    y, expected = layer(mine), dense(theirs)
    torch.testing.assert_close(y, expected)
    assert y.shape == expected.shape
    g = torch.randn_like(expected) if g is None else g
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(mine.grad, theirs.grad)
    weight = layer.weight
    active = weight.rows >= 0
    grad = dense.weight.grad[weight.rows[active].long(), weight.cols[active].long()]
    torch.testing.assert_close(weight.values.grad[active], grad, rtol=1e-4, atol=1e-5)
    assert not weight.values.grad[~active].any()
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("contiguous_output", [True, False])
@pytest.mark.parametrize("lead", [(), (1,), (7,), (64,), (2, 3), (2, 3, 2), (0,), (2, 0)])
def test_equals_linear(
    dtype: torch.dtype, bias: bool, contiguous_output: bool, lead: tuple[int, ...], twin: Any
) -> None:
    layer = make(dtype, bias, contiguous_output=contiguous_output)
    x = torch.randn(*lead, 20, dtype=dtype)
    same_as_dense(layer, twin(layer), x)
    if contiguous_output:
        assert layer(x).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype, twin: Any) -> None:
    layer = make(dtype)
    dense = twin(layer)
    inputs = {
        "transposed": torch.randn(20, 7, dtype=dtype).t(),
        "every second feature": torch.randn(7, 40, dtype=dtype)[:, ::2],
        "every second example": torch.randn(14, 20, dtype=dtype)[::2],
        "shifted": torch.randn(141, dtype=dtype)[1:].view(7, 20),
        "one example, expanded": torch.randn(20, dtype=dtype).expand(7, 20),
        "one feature, expanded": torch.randn(7, 1, dtype=dtype).expand(7, 20),
        "3-D, permuted": torch.randn(20, 3, 4, dtype=dtype).permute(2, 1, 0),
    }
    for x in inputs.values():
        same_as_dense(layer, dense, x)
    for g in (torch.ones(1, 1, dtype=dtype).expand(7, 30), torch.randn(30, 7, dtype=dtype).t()):
        same_as_dense(layer, dense, torch.randn(7, 20, dtype=dtype), g)
    y = layer(inputs["transposed"])
    y.sum().backward()  # an expanded gradient of stride 0


def test_output_owns_its_memory_and_is_feature_major() -> None:
    layer = make()
    y = layer(torch.randn(7, 20))
    assert y.stride() == (1, 7)
    assert y._base is None
    before = y.detach().clone()
    z = F.relu(y, inplace=True)
    z.sum().backward()
    assert torch.equal(z, before.clamp(min=0))


def test_inplace_relu_between_layers(twin: Any) -> None:
    a, b = make(), SparseLinear(30, 4, density=0.5)
    model = nn.Sequential(a, nn.ReLU(inplace=True), b)
    dense = nn.Sequential(twin(a), nn.ReLU(inplace=True), twin(b))
    x = torch.randn(9, 20)
    for m in (model, dense):
        m(x).pow(2).sum().backward()
    torch.testing.assert_close(model(x), dense(x))
    torch.testing.assert_close(a.bias.grad, dense[0].bias.grad)
    rows, cols = (t[a.weight.rows >= 0].long() for t in (a.weight.rows, a.weight.cols))
    torch.testing.assert_close(
        a.weight.values.grad[a.weight.rows >= 0], dense[0].weight.grad[rows, cols]
    )


@pytest.mark.parametrize("order", [1, 2])
def test_gradcheck(order: int) -> None:
    layer = SparseLinear(4, 3, connections=7, capacity=9, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(
            layer, {"weight.values": values, "bias": bias}, (x,)
        )
        return result

    inputs = (
        x,
        layer.weight.values.detach().clone().requires_grad_(),
        layer.bias.detach().clone().requires_grad_(),
    )
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(product, inputs)


def test_shape_and_dtype_errors_are_clear() -> None:
    layer = make()
    with pytest.raises(
        RuntimeError,
        match=r"x has shape \(3, 19\), but the layer takes "
        r"\(\.\.\., 20\)",
    ):
        layer(torch.randn(3, 19))
    with pytest.raises(RuntimeError, match=r"x has shape \(\)"):
        layer(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"float64 .*float32"):
        layer(torch.randn(3, 20, dtype=torch.float64))


# --- initialisation -------------------------------------------------------------------------------


def test_initialisation_at_density_1_is_that_of_linear() -> None:
    layer = SparseLinear(100, 300, density=1.0)
    bound = 1 / math.sqrt(100)
    for drawn in (layer.weight.values, layer.bias):
        assert drawn.abs().max() <= bound
        assert drawn.abs().max() > 0.97 * bound
        assert abs(float(drawn.detach().mean())) < 5 * bound / math.sqrt(3 * drawn.numel())


# --- a rewire between forward and backward --------------------------------------------------------


def _rewire(layer: SparseLinear, dormant: Any) -> None:
    layer.weight.rewire(torch.tensor([0]), *dormant(layer.weight, 1), 0.1)


def _reload(layer: SparseLinear, dormant: Any) -> None:
    layer.load_state_dict(make().state_dict())


def _deep_r(layer: SparseLinear, dormant: Any) -> None:
    from rewire.methods import DeepR

    optimizer = optim.SGD(layer.parameters(), lr=1.0)
    method = DeepR(layer, optimizer, noise=1.0, seed=1)
    # a frozen layer is left alone, and nothing would change
    values = layer.weight.values.requires_grad_(True)
    values.grad = torch.zeros_like(values)
    optimizer.step()
    method.step()


CHANGES = {
    "rewire": _rewire,
    "empty a slot": lambda layer, dormant: layer.weight.rewire(*torch.tensor([[1], [-1], [-1]])),
    "reorder": lambda layer, dormant: layer.weight.reorder(),
    "grow": lambda layer, dormant: layer.weight.resize(300),
    "shrink": lambda layer, dormant: layer.weight.resize(layer.weight.connections),
    "load": _reload,
    "load another K": lambda layer, dormant: layer.load_state_dict(
        SparseLinear(20, 30, connections=99).state_dict()
    ),
    "DEEP R": _deep_r,
    "reset": lambda layer, dormant: layer.reset_parameters(),
    "native change of values": lambda layer, dormant: layer.weight.touched(),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("needs", ["x and values", "x only", "values only"])
def test_a_change_between_forward_and_backward_raises(name: str, needs: str, dormant: Any) -> None:
    layer = make()
    x = torch.randn(5, 20, requires_grad=needs != "values only")
    layer.weight.values.requires_grad_(needs != "x only")
    y = layer(x)
    layer.weight.values.requires_grad_()
    CHANGES[name](layer, dormant)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    layer.zero_grad()
    layer(torch.randn(5, 20)).sum().backward()  # a fresh graph is fine
    assert layer.weight.values.grad.shape == layer.weight.values.shape


@pytest.mark.parametrize(
    "name", [n for n in CHANGES if n not in ("reset", "native change of values")]
)
def test_a_change_of_topology_before_backward_of_the_dense_form_raises(
    name: str, dormant: Any
) -> None:
    layer = make()
    y = layer.weight.to_dense()
    CHANGES[name](layer, dormant)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- training like any other layer ----------------------------------------------------------------


def pair(
    twin: Any, dtype: torch.dtype = torch.float64
) -> tuple[nn.Sequential, nn.Sequential, list[Tensor]]:
    """A sparse model, its dense twin, and the masks that keep the twin sparse."""
    sparse = nn.Sequential(make(dtype), nn.Tanh(), SparseLinear(30, 5, density=0.3, dtype=dtype))
    dense = nn.Sequential(twin(sparse[0]), nn.Tanh(), twin(sparse[2]))
    masks = []
    for i in (0, 2):
        mask = torch.zeros_like(dense[i].weight)
        rows, cols, _ = sparse[i].weight.coo()
        mask[rows, cols] = 1
        masks.append(mask)
        dense[i].weight.register_hook(lambda g, mask=mask: g * mask)
    return sparse, dense, masks


def batches(n: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 20, dtype=dtype), torch.randint(0, 5, (8,))) for _ in range(n)]


def agree(sparse: nn.Sequential, dense: nn.Sequential) -> None:
    for i in (0, 2):
        torch.testing.assert_close(sparse[i].weight.to_dense(), dense[i].weight)
        torch.testing.assert_close(sparse[i].bias, dense[i].bias)


def test_gradient_accumulation_and_clipping_and_schedulers(twin: Any) -> None:
    sparse, dense, _ = pair(twin)
    data = batches(12)
    norms: dict[int, list[Tensor]] = {0: [], 1: []}
    for which, model in enumerate((sparse, dense)):
        optimizer = optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
        scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for i, (x, y) in enumerate(data):
            (F.cross_entropy(model(x), y) / 3).backward()
            if i % 3 == 2:
                norms[which].append(nn.utils.clip_grad_norm_(model.parameters(), 0.2))
                optimizer.step()
                optimizer.zero_grad(set_to_none=i % 2 == 0)
                scheduler.step()
    torch.testing.assert_close(norms[0], norms[1])
    agree(sparse, dense)


def test_several_groups_and_several_optimizers(twin: Any) -> None:
    sparse, dense, _ = pair(twin)
    data = batches(6)
    for model in (sparse, dense):
        first = optim.Adam(param_groups(model[0], 1e-2), lr=1e-2)
        first.param_groups[1]["lr"] = 3e-2
        second = optim.RMSprop(model[2].parameters(), lr=1e-3)
        for x, y in data:
            for o in (first, second):
                o.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for o in (first, second):
                o.step()
    agree(sparse, dense)


def test_grad_scaler_with_a_skipped_step(twin: Any) -> None:
    sparse, dense, _ = pair(twin, torch.float32)
    data = batches(6, torch.float32)
    data[2][0][0, 0] = math.inf
    scales: dict[int, list[float]] = {0: [], 1: []}
    for which, model in enumerate((sparse, dense)):
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for x, y in data:
            optimizer.zero_grad()
            before = [p.detach().clone() for p in model.parameters()]
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if not x.isfinite().all():
                assert all(
                    torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
                )
            scales[which].append(scaler.get_scale())
    assert scales[0] == scales[1]
    assert scales[0][2] < scales[0][1]  # the step was skipped indeed
    for i in (0, 2):
        torch.testing.assert_close(
            sparse[i].weight.to_dense(), dense[i].weight, rtol=1e-4, atol=1e-5
        )


def test_autocast(twin: Any) -> None:
    layer = make()
    dense = twin(layer)
    x = torch.randn(6, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), dense(x)
        again = layer(y[:, :20])  # narrowed activations come in as well
    assert y.dtype == expected.dtype == again.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    own = ops.sparse_linear(x.bfloat16(), layer.weight.values, layer.bias, layer.weight.index)
    assert torch.equal(y, own)  # the activations have 16 bits, not only the result
    y.float().pow(2).sum().backward()
    expected.float().pow(2).sum().backward()
    assert layer.weight.values.grad.dtype == torch.float32
    active = layer.weight.rows >= 0
    grad = dense.weight.grad[layer.weight.rows[active].long(), layer.weight.cols[active].long()]
    torch.testing.assert_close(layer.weight.values.grad[active], grad, rtol=0.1, atol=0.1)
    assert layer(x).dtype == torch.float32


def test_training_after_every_rewire_equals_a_dense_twin(twin: Any, dormant: Any) -> None:
    layer = make(torch.float64)
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    for step in range(5):
        dense = twin(layer)
        x = torch.randn(8, 20, dtype=torch.float64)
        same_as_dense(layer, dense, x)
        optimizer.step()
        slots = torch.randperm(203)[:20]
        layer.weight.rewire(slots, *dormant(layer.weight, 20, step), 0.3)


def test_frozen_values_get_no_gradient_but_the_input_does(twin: Any) -> None:
    layer = make()
    layer.requires_grad_(False)
    x = torch.randn(3, 20, requires_grad=True)
    layer(x).sum().backward()
    expected = twin(layer).weight.sum(0).expand(3, 20)
    torch.testing.assert_close(x.grad, expected)
    assert layer.weight.values.grad is None


def test_two_calls_of_one_layer_add_their_gradients(twin: Any) -> None:
    layer = SparseLinear(6, 6, density=0.5, dtype=torch.float64)
    dense = twin(layer)
    x = torch.randn(4, 6, dtype=torch.float64)
    for m in (layer, dense):
        m(torch.tanh(m(x))).sum().backward()
    rows, cols = layer.weight.rows.long(), layer.weight.cols.long()
    torch.testing.assert_close(layer.weight.values.grad, dense.weight.grad[rows, cols])


def test_capture_keeps_inputs_and_gradients() -> None:
    layer = make()
    layer.weight.capture = []
    x, g = torch.randn(4, 20), torch.randn(4, 30)
    layer(x).backward(g)
    layer(2 * x[:3]).backward(g[:3])
    one, two = layer.weight.capture
    for got, expected in ((one.x, x), (one.g, g), (two.x, 2 * x[:3]), (two.g, g[:3])):
        assert torch.equal(got, expected)
        assert not got.requires_grad
    assert copy.deepcopy(layer).weight.capture is None


def test_no_warnings_in_a_whole_training_step() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Sequential(
            make(), nn.BatchNorm1d(30), nn.Dropout(0.5), nn.GELU(), SparseLinear(30, 5, density=0.2)
        )
        optimizer = optim.AdamW(model.parameters())
        F.cross_entropy(model(torch.randn(8, 20)), torch.randint(0, 5, (8,))).backward()
        optimizer.step()

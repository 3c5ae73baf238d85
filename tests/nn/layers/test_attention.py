"""SparseMultiheadAttention equals PyTorch's layer on its dense weights."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from rewire.nn import SparseMultiheadAttention, densify, sparse_weights

VARIANTS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "other sizes": {"kdim": 5, "vdim": 3},
}


def build(variant="plain", **options):
    layer = SparseMultiheadAttention(
        8, 2, **({"density": 0.4, "dtype": torch.float64} | VARIANTS[variant] | options)
    )
    with torch.no_grad():
        for parameter in (layer.in_proj_bias, layer.out_proj.bias):
            if parameter is not None:
                parameter.uniform_(-1, 1)
    return layer


def dense_twin(layer):
    return densify(nn.Sequential(copy.deepcopy(layer)))[0]


def sequences(layer, targets=3, sources=6, batch=4):
    """Query, key and value as leaves."""
    sizes = ((targets, layer.embed_dim), (sources, layer.kdim), (sources, layer.vdim))
    for length, features in sizes:
        shape = (length, features) if batch is None else (length, batch, features)
        x = torch.randn(shape, dtype=layer.q_proj_weight.dtype)
        yield (x.transpose(0, 1) if layer.batch_first and batch is not None else x).requires_grad_()


def masks(targets, sources, batch, heads):
    """Pairs of attn_mask and key_padding_mask, as options of forward."""
    forbidden = torch.rand(targets, sources) > 0.6
    forbidden[:, 0] = False
    padding = torch.zeros(batch, sources, dtype=torch.bool)
    padding[1, -2:] = True
    added = torch.randn(batch * heads, targets, sources, dtype=torch.float64)
    yield {}
    yield {"attn_mask": forbidden}
    yield {"key_padding_mask": padding}
    yield {"attn_mask": forbidden, "key_padding_mask": padding}
    yield {"attn_mask": added, "key_padding_mask": padding.double() * -3}


def compare(layer, inputs, **options):
    """Results and all gradients against the twin."""
    twin = dense_twin(layer)
    leaves = list(dict.fromkeys(inputs))
    grads = []
    results = []
    for module in (layer, twin):
        for x in leaves:
            x.grad = None
        module.zero_grad()
        y, weights = module(*inputs, **options)
        g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        loss = (y * g).sum() + (0 if weights is None else (weights**2).sum())
        loss.backward()
        results.append((y, weights))
        grads.append([x.grad.clone() for x in leaves])
    (y, weights), (expected, expected_weights) = results
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(grads[0], grads[1])
    for name, parameter in twin.named_parameters():
        mine = dict(layer.named_parameters())
        if name in mine:
            torch.testing.assert_close(mine[name].grad, parameter.grad)
        elif name == "in_proj_weight":
            parts = parameter.grad.chunk(3)
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            for part, which in zip(parts, names, strict=True):
                assert_pool_gradient(layer, which, part)
        else:
            assert_pool_gradient(layer, name, parameter.grad)


def assert_pool_gradient(layer, name, dense):
    weight = layer.get_submodule(name)
    rows, cols, _ = weight.coo()
    torch.testing.assert_close(
        weight.values.grad[weight.active()], dense[rows, cols], msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_equals_the_twin(variant, batch_first, need_weights):
    layer = build(variant, batch_first=batch_first)
    for options in masks(3, 6, 4, 2):
        for average in (True, False) if need_weights else (True,):
            inputs = tuple(sequences(layer))
            compare(
                layer, inputs, need_weights=need_weights, average_attn_weights=average, **options
            )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_unbatched(variant, need_weights):
    layer = build(variant, batch_first=True)
    inputs = tuple(sequences(layer, batch=None))
    compare(layer, inputs, need_weights=need_weights)
    padding = torch.tensor([False, True, False, False, True, False])
    compare(layer, inputs, need_weights=need_weights, key_padding_mask=padding)


@pytest.mark.parametrize("need_weights", [False, True])
def test_self_attention_and_the_causal_hint(need_weights):
    layer = build()
    x = next(sequences(layer, targets=5))
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = torch.zeros(4, 5, dtype=torch.float64)
    padding[1, 3:] = -torch.inf
    for options in ({}, {"key_padding_mask": padding}):
        for is_causal in (False, True):
            compare(
                layer,
                (x, x, x),
                need_weights=need_weights,
                attn_mask=causal,
                is_causal=is_causal,
                **options,
            )
    compare(layer, (x, x, x), need_weights=need_weights)


def test_the_hint_does_not_hide_added_positions():
    layer = build("bias_kv")
    x = next(sequences(layer, targets=5))
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    hinted, plain = (
        layer(x, x, x, attn_mask=causal, need_weights=False, is_causal=h)[0] for h in (True, False)
    )
    torch.testing.assert_close(hinted, plain)


def test_one_copy_of_a_shared_input_is_kept():
    layer = build()
    for _, weight in sparse_weights(layer):
        weight.capture = []
    x = torch.randn(5, 4, 8, dtype=torch.float64)
    layer(x, x, x)[0].sum().backward()
    q, k, v = (getattr(layer, f"{n}_proj_weight").capture[0].x for n in "qkv")
    assert q.data_ptr() == k.data_ptr() == v.data_ptr()
    for _, weight in sparse_weights(layer):
        (pair,) = weight.capture
        rows, cols, _ = weight.coo()
        torch.testing.assert_close(
            (pair.g.t() @ pair.x)[rows, cols], weight.values.grad[weight.active()]
        )


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout(need_weights):
    layer = build(dropout=0.5)
    x = torch.randn(5, 4, 8, dtype=torch.float64)
    assert dense_twin(layer).dropout == 0.5

    def run():
        return layer(x, x, x, need_weights=need_weights)[0]

    assert not torch.equal(run(), run())
    layer.eval()
    torch.testing.assert_close(run(), dense_twin(layer)(x, x, x, need_weights=need_weights)[0])


def test_output_is_laid_out_in_rows():
    for batch_first in (False, True):
        layer = build(batch_first=batch_first)
        x = torch.randn(5, 4, 8, dtype=torch.float64)
        assert layer(x, x, x)[0].is_contiguous()


def test_budgets():
    def counts(**budget):
        return [
            w.connections
            for _, w in sparse_weights(SparseMultiheadAttention(8, 2, kdim=4, vdim=2, **budget))
        ]

    assert counts(connections=[3, 4, 5, 6]) == [3, 4, 5, 6]
    assert counts(density=0.5, distribution="uniform") == [32, 16, 8, 32]
    assert sum(counts(connections=100)) == 100
    named = {"q_proj_weight": 3, "k_proj_weight": 4, "v_proj_weight": 5, "out_proj.weight": 6}
    assert counts(connections=named) == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="but the weights are q_proj_weight, "):
        counts(connections={"in_proj_weight": 3})


def test_starts_as_pytorch_does():
    g = torch.Generator().manual_seed(0)
    layer = SparseMultiheadAttention(64, 4, density=0.5, generator=g, init="dense")
    twin = nn.MultiheadAttention(64, 4)
    bounds = [layer.q_proj_weight.values.abs().max(), layer.out_proj.weight.values.abs().max()]
    expected = [twin.in_proj_weight.abs().max(), twin.out_proj.weight.abs().max()]
    torch.testing.assert_close(torch.stack(bounds), torch.stack(expected), rtol=0.01, atol=0)
    assert not layer.in_proj_bias.any()
    assert not layer.out_proj.bias.any()


def test_errors_say_what_is_wrong():
    layer = SparseMultiheadAttention(8, 2, density=0.5)
    x, mask = torch.randn(5, 4, 8), torch.zeros(5, 5)
    for arguments, options, message in [
        ((x, x[:, 0], x), {}, "must all be 3-D"),
        ((x, x, x[:3]), {}, "differ in positions or batch"),
        ((x, x[:, :3], x[:, :3]), {}, "different batch sizes"),
        ((x, x, x[..., :7]), {}, "value has 7 features, the layer takes 8"),
        ((x, x, x), {"is_causal": True}, "must be given as well"),
        (
            (x, x, x),
            {"attn_mask": mask[:4]},
            r"attn_mask must have the shape \(5, 5\) or \(8, 5, "
            r"5\), not \(4, 5\)",
        ),
        ((x, x, x), {"attn_mask": mask.int()}, "attn_mask must be boolean or floating-point"),
        (
            (x, x, x),
            {"key_padding_mask": mask},
            r"key_padding_mask must cover \(4, 5\), not "
            r"\(5, 5\)",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layer(*arguments, **options)
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    with pytest.raises(RuntimeError, match="nested tensors are not supported"):
        layer(nested, nested, nested)
    for sizes in ((8, 3), (0, 1), (8, 0)):
        with pytest.raises(ValueError, match="positive multiple"):
            SparseMultiheadAttention(*sizes, density=0.5)


def test_state_dict_copy_and_meta():
    first, other = build("bias_kv"), build("bias_kv")
    x = torch.randn(5, 4, 8, dtype=torch.float64)
    other.load_state_dict(first.state_dict())
    copied = copy.deepcopy(first)
    for layer in (other, copied):
        assert torch.equal(layer(x, x, x)[0], first(x, x, x)[0])
    meta = SparseMultiheadAttention(8, 2, density=0.5, device="meta")
    assert all(p.device.type == "meta" for p in meta.parameters())


def test_autocast():
    layer = build(dtype=torch.float32)
    x = torch.randn(5, 4, 8)
    expected = layer(x, x, x)
    for need_weights, kind in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            y, weights = layer(*(x.to(kind),) * 3, need_weights=need_weights)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected[0], rtol=5e-2, atol=5e-2)
        assert (weights is None) != need_weights
    y.float().sum().backward()
    assert layer.q_proj_weight.values.grad.dtype == torch.float32


def test_gradcheck():
    layer = build("zero_attn", density=0.2)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 1, 8, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), (x, x, x)
        )

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *parameters), fast_mode=True)


# torch's compiler calls what torch deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("need_weights", [False, True])
def test_compiles_and_exports(need_weights):
    torch._dynamo.reset()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = build(batch_first=True)

        def forward(self, x, memory):
            y, _ = self.attention(x, x, x, need_weights=need_weights)
            return self.attention(y, memory, memory, need_weights=need_weights)[0]

    net = Net()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(3, 4, 8, dtype=torch.float64)
    leaves = [x, *net.parameters()]
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    results = [
        (y, *torch.autograd.grad(y.square().sum(), leaves))
        for y in (net(x, memory), compiled(x, memory))
    ]
    torch.testing.assert_close(results[1], results[0])
    program = torch.export.export(net, (x, memory))
    torch.testing.assert_close(program.module()(x, memory), net(x, memory))

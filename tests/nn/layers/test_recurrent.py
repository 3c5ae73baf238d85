"""SparseRNN, SparseLSTM and SparseGRU equal PyTorch's layers on their dense weights."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rewire.nn import SparseGRU, SparseLSTM, SparseRNN, SparseWeight, densify, sparse_weights

KINDS = {
    "tanh": (SparseRNN, {}),
    "relu": (SparseRNN, {"nonlinearity": "relu"}),
    "gru": (SparseGRU, {}),
    "lstm": (SparseLSTM, {}),
    "projected": (SparseLSTM, {"proj_size": 3}),
}
all_kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind, *sizes, **options):
    cls, extra = KINDS[kind]
    options = {"density": 0.4, "dtype": torch.float64} | extra | options
    return cls(*(sizes or (5, 6)), **options)


def dense_twin(layer):
    """PyTorch's layer with the same weights; made by `densify`, whose constructor arguments are
    checked elsewhere.
    """
    return densify(nn.Sequential(copy.deepcopy(layer)))[0]


def tensors(result):
    """Everything that came out, as plain tensors."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return (
        [result]
        if isinstance(result, torch.Tensor)
        else [t for part in result for t in tensors(part)]
    )


def gradients(layer, inputs, result):
    """Of all inputs and parameters, for fixed gradients of all that came out; pools' as dense
    tensors by name.
    """
    g = torch.Generator().manual_seed(1)
    loss = sum(
        (t * torch.randn(t.shape, generator=g, dtype=t.dtype)).sum() for t in tensors(result)
    )
    layer.zero_grad()
    for x in inputs:
        x.grad = None
    loss.backward()
    found = {str(i): x.grad.clone() for i, x in enumerate(inputs)}
    for name, parameter in layer.named_parameters():
        found[name] = parameter.grad.clone()
    return found


def assert_same_gradients(layer, mine, dense):
    for name, expected in dense.items():
        if name in mine:
            torch.testing.assert_close(mine[name], expected, msg=lambda m, n=name: f"{n}: {m}")
        else:
            weight = layer.get_submodule(name)
            slots = weight.active()
            at = expected[weight.rows[slots].long(), weight.cols[slots].long()]
            torch.testing.assert_close(
                mine[f"{name}.values"][slots], at, msg=lambda m, n=name: f"{n}: {m}"
            )


def initial(layer, batch, dtype=torch.float64):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    shape = (count,) if batch is None else (count, batch)
    h = torch.randn(*shape, layer.output_size, dtype=dtype, requires_grad=True)
    if not isinstance(layer, SparseLSTM):
        return h
    return h, torch.randn(*shape, layer.hidden_size, dtype=dtype, requires_grad=True)


def compare(layer, x, hx=None):
    """Results, return structure and all gradients against the twin."""
    twin = dense_twin(layer)
    leaves = [*tensors(x), *(tensors(hx) if hx is not None else [])]
    leaves = [t for t in leaves if t.is_leaf and t.requires_grad]
    arguments = (x,) if hx is None else (x, hx)
    mine, theirs = layer(*arguments), twin(*arguments)
    assert type(mine) is type(theirs)
    for a, b in zip(tensors(mine), tensors(theirs), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)
    assert_same_gradients(layer, gradients(layer, leaves, mine), gradients(twin, leaves, theirs))
    return mine, theirs


@all_kinds
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_equals_the_twin(kind, bidirectional, num_layers, bias):
    for batch_first, given in itertools.product((False, True), (False, True)):
        layer = build(
            kind,
            num_layers=num_layers,
            bidirectional=bidirectional,
            bias=bias,
            batch_first=batch_first,
        )
        x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
        compare(layer, x, initial(layer, 4 if batch_first else 3) if given else None)


@all_kinds
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(
    "lengths", [[5, 3, 3, 1], [2, 5, 1, 5], [4, 4, 4, 4]], ids=["sorted", "unsorted", "equal"]
)
def test_packed_sequences(kind, bidirectional, lengths):
    layer = build(kind, num_layers=2, bidirectional=bidirectional)
    x = torch.randn(5, 4, 5, dtype=torch.float64, requires_grad=True)
    is_sorted = lengths == sorted(lengths, reverse=True)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=is_sorted)
    leaf = packed._replace(data=packed.data.detach().requires_grad_())
    for hx in (None, initial(layer, 4)):
        (mine, _), (theirs, _) = compare(layer, leaf, hx)
        assert torch.equal(mine.batch_sizes, theirs.batch_sizes)
        assert (mine.sorted_indices is None) == (theirs.sorted_indices is None)
        torch.testing.assert_close(pad_packed_sequence(mine), pad_packed_sequence(theirs))
    layer(packed)[0].data.sum().backward()
    assert not x.grad[lengths[-1] :, -1].any()  # padding has no say


@all_kinds
@pytest.mark.parametrize("shape", [(4, 5), (1, 1, 5), (1, 3, 5), (4, 1, 5), (4, 0, 5)], ids=str)
def test_unbatched_and_extreme_shapes(kind, shape):
    layer = build(kind, bidirectional=True)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    compare(layer, x, initial(layer, shape[1] if len(shape) == 3 else None))
    compare(layer, x)


def test_results_are_laid_out_as_in_pytorch():
    layer = build("lstm", bidirectional=True)
    assert layer(torch.randn(4, 3, 5, dtype=torch.float64))[0].is_contiguous()  # so .view works


@pytest.mark.parametrize("kind", ["tanh", "gru", "projected"])
def test_gradcheck(kind):
    layer = build(kind, 2, 4)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return tensors(torch.func.functional_call(layer, named, (x,)))

    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters), atol=1e-4, fast_mode=True)


@all_kinds
def test_second_derivatives_where_the_input_depends_on_the_initial_state(kind):
    layer = build(kind, num_layers=2, bidirectional=True)
    found = []
    for module in (layer, dense_twin(layer)):
        seed = torch.linspace(-1, 1, 4 * 3, dtype=torch.float64).view(4, 3, 1).requires_grad_()
        hx = seed.expand(4, 3, layer.output_size)
        if isinstance(layer, SparseLSTM):
            hx = (hx, seed.expand(4, 3, layer.hidden_size))
        x = (seed * seed).expand(4, 3, 5)
        loss = sum((t**2).sum() for t in tensors(module(x, hx)))
        (first,) = torch.autograd.grad(loss, seed, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), seed)
        found.append((first, second))
    torch.testing.assert_close(found[0], found[1])


@all_kinds
def test_same_without_gradients(kind):
    layer = build(kind, num_layers=2, bidirectional=True)
    x = pack_padded_sequence(torch.randn(5, 4, 5, dtype=torch.float64), [5, 3, 3, 1])
    with torch.no_grad():
        quiet = layer(x)
    torch.testing.assert_close(tensors(quiet), tensors(layer(x)))


def test_dropout_acts_between_layers_in_training():
    layer = SparseLSTM(5, 6, 2, dropout=1.0, density=0.5)
    twin = dense_twin(layer)
    x = torch.randn(4, 3, 5)
    assert twin.dropout == 1.0
    # all of the first layer's output is dropped in both
    torch.testing.assert_close(layer(x), twin(x))
    torch.testing.assert_close(layer.eval()(x), twin.eval()(x))
    some = SparseGRU(5, 6, 2, dropout=0.5, density=0.5)
    assert not torch.equal(some(x)[0], some(x)[0])
    assert torch.equal(some.eval()(x)[0], some(x)[0])
    with pytest.warns(UserWarning, match="no effect with num_layers=1"):
        SparseRNN(3, 4, dropout=0.5, density=0.5)


@all_kinds
def test_names_are_those_of_pytorch(kind):
    layer = build(kind, num_layers=2, bidirectional=True)
    twin = dense_twin(layer)
    assert list(layer.weight_shapes()) == [
        n for n, _ in twin.named_parameters() if n.startswith("weight")
    ]
    assert [n for n, p in twin.named_parameters() if p.dim() == 1] == layer.bias_names()
    for name, shape in layer.weight_shapes().items():
        assert isinstance(getattr(layer, name), SparseWeight)
        assert getattr(layer, name).shape == getattr(twin, name).shape == shape


def test_budgets():
    def counts(**budget):
        return [w.connections for _, w in sparse_weights(SparseLSTM(10, 8, proj_size=4, **budget))]

    assert counts(connections=[3, 4, 5]) == [3, 4, 5]
    assert counts(connections={"weight_hr_l0": 5, "weight_ih_l0": 3, "weight_hh_l0": 4}) == [
        3,
        4,
        5,
    ]
    assert counts(density=[0.5, 0.25, 1.0]) == [160, 32, 32]
    assert counts(density=0.5, distribution="uniform") == [160, 64, 16]
    assert sum(counts(connections=100)) == 100
    assert sum(counts(density=0.3, distribution="er")) == round(0.3 * 480)
    for budget, message in [
        ({}, "exactly one of"),
        ({"connections": 9, "density": 0.5}, "exactly one of"),
        ({"connections": [3, 4]}, "2 entries for 3 weights"),
        ({"connections": {"weight_ih_l0": 3}}, "but the weights are weight_ih_l0, weight_hh_l0"),
        ({"connections": [3, 4, 33]}, "weight_hr_l0 can have between 1 and 32 connections, not 33"),
        ({"connections": 2}, "cannot be spread"),
        ({"density": 0.0}, "above 0"),
        ({"density": 0.5, "distribution": "none"}, "unknown distribution"),
    ]:
        with pytest.raises(ValueError, match=message):
            counts(**budget)


def test_errors_say_what_is_wrong():
    layer = SparseLSTM(5, 6, density=0.5)
    for shape in ((4, 3, 6), (5,), (2, 2, 2, 5)):
        with pytest.raises(RuntimeError, match=r"2-D or 3-D with 5 features last, not of shape"):
            layer(torch.randn(shape))
    with pytest.raises(RuntimeError, match="no steps"):
        layer(torch.randn(0, 3, 5))
    with pytest.raises(
        RuntimeError,
        match=r"initial states must have the shapes \[\(1, 3, 6\), "
        r"\(1, 3, 6\)\]",
    ):
        layer(torch.randn(4, 3, 5), (torch.zeros(1, 3, 6), torch.zeros(1, 2, 6)))
    with pytest.raises(RuntimeError, match="a 3-D input needs 3-D initial states, not 2-D, 2-D"):
        layer(torch.randn(4, 3, 5), (torch.zeros(1, 6), torch.zeros(1, 6)))
    with pytest.raises(
        RuntimeError,
        match=r"x is torch.float64 but the weight's values are "
        r"torch.float32",
    ):
        layer(torch.randn(4, 3, 5).double())
    for options, message in [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"dropout": 1.5}, "dropout"),
        ({"proj_size": 6}, "proj_size"),
        ({"proj_size": -1}, "proj_size"),
    ]:
        with pytest.raises(ValueError, match=message):
            SparseLSTM(**({"input_size": 5, "hidden_size": 6, "density": 0.5} | options))
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', not 'sin'"):
        SparseRNN(5, 6, nonlinearity="sin", density=0.5)


# --- states, copies, compilers --------------------------------------------------------------------


def test_state_dict_copy_and_seed():
    def make(seed):
        return SparseGRU(
            5, 6, bidirectional=True, density=0.3, generator=torch.Generator().manual_seed(seed)
        )

    first, same, other = make(1), make(1), make(2)
    x = torch.randn(4, 3, 5)
    assert torch.equal(first(x)[0], same(x)[0])
    assert not torch.equal(first(x)[0], other(x)[0])
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(x)[0], other(x)[0])
    copied = copy.deepcopy(first)
    with torch.no_grad():
        first.weight_hh_l0.values.zero_()
    assert torch.equal(copied(x)[0], same(x)[0])
    assert not torch.equal(first(x)[0], same(x)[0])


def test_a_rewire_between_forward_and_backward_raises():
    layer = SparseLSTM(5, 6, density=0.3)
    y, _ = layer(torch.randn(4, 3, 5))
    weight = layer.weight_hh_l0
    rows, cols, _ = weight.coo()
    weight.rewire(weight.active()[:1], rows[:1], cols[:1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@all_kinds
def test_capture_sums_to_the_gradient(kind):
    layer = build(kind, num_layers=2)
    weights = dict(sparse_weights(layer))
    for weight in weights.values():
        weight.capture = []
    x = pack_padded_sequence(torch.randn(4, 3, 5, dtype=torch.float64), [4, 2, 1])
    tensors(layer(x))[0].square().sum().backward()
    for name, weight in weights.items():
        assert len(weight.capture) == 1
        assert all(
            t.stride(0) == 1 and not t.requires_grad for p in weight.capture for t in (p.x, p.g)
        )
        dense = sum(p.g.t() @ p.x for p in weight.capture)
        rows, cols, _ = weight.coo()
        torch.testing.assert_close(dense[rows, cols], weight.values.grad[weight.active()], msg=name)


@pytest.mark.parametrize("kind", ["tanh", "gru", "projected"])
def test_autocast_narrows_results_only(kind):
    layer = build(kind, 5, 6, dtype=torch.float32)
    x = torch.randn(4, 3, 5)
    expected = layer(x)
    packed = pack_padded_sequence(x, [4, 4, 4])
    with torch.autocast("cpu", torch.bfloat16):
        narrow = (
            layer(x.bfloat16(), tuple(torch.zeros_like(t) for t in expected[1]))
            if kind == "projected"
            else layer(x)
        )
        (from_packed, _) = layer(packed)
    for a, b in zip(tensors(narrow), tensors(expected), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2)
    assert from_packed.data.dtype == torch.bfloat16
    narrow[0].float().sum().backward()
    assert layer.weight_hh_l0.values.grad.dtype == torch.float32


# torch's compiler calls what torch deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["gru", "projected"])
def test_compiles(kind):
    torch._dynamo.reset()
    layer = build(kind, bidirectional=True, batch_first=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    hx = initial(layer, 2)
    leaves = [x, *tensors(hx)]
    mine, expected = compiled(x, hx), layer(x, hx)
    for a, b in zip(tensors(mine), tensors(expected), strict=True):
        torch.testing.assert_close(a, b)
    a, b = gradients(layer, leaves, mine), gradients(layer, leaves, expected)
    torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["tanh", "lstm"])
def test_exports_with_a_dynamic_batch(kind):
    layer = build(kind, bidirectional=True)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({1: batch},)
    program = torch.export.export(
        layer, (torch.randn(3, 2, 5, dtype=torch.float64),), dynamic_shapes=shapes
    )
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    for a, b in zip(tensors(program.module()(x)), tensors(layer(x)), strict=True):
        torch.testing.assert_close(a, b)


def test_trains_with_spare_slots():
    layer = SparseLSTM(5, 6, density=0.3)
    layer.weight_hh_l0.resize(layer.weight_hh_l0.connections + 7)
    layer.reset_parameters()
    compare(layer, torch.randn(4, 3, 5, requires_grad=True))
    assert not layer.weight_hh_l0.values[layer.weight_hh_l0.rows < 0].any()


def test_meta_device():
    layer = SparseGRU(5, 6, density=0.3, device="meta")
    assert all(p.device.type == "meta" for p in layer.parameters())

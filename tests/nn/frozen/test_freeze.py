"""`rewire.freeze`: every layer type computes what it did, as a plain module."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import rewire
from rewire import methods
from rewire.nn import (
    FrozenWeight,
    SparseConv2d,
    SparseLinear,
    SparseMultiheadAttention,
    SparseWeight,
    SReLU,
    freeze,
    frozen_weights,
    sparse_weights,
    sparsify,
)
from rewire.nn.convert.kinds import KINDS
from rewire.nn.frozen.layers import FROZEN
from twins import NAMES, made, output

EXACT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, while tracing
        yield


def sparse(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer, args = made(name)
    return sparsify(layer, density=0.5, distribution="uniform").eval(), args


def test_every_sparse_layer_has_a_frozen_one() -> None:
    assert set(FROZEN) == {kind.sparse for kind in KINDS}
    for plain, frozen in FROZEN.items():
        assert issubclass(frozen, plain)
        assert frozen.__name__ == plain.__name__.replace("Sparse", "Frozen")


@pytest.mark.parametrize("name", NAMES)
def test_computes_the_same(name: str) -> None:
    layer, args = sparse(name)
    frozen = freeze(layer)
    with torch.no_grad():
        torch.testing.assert_close(output(frozen, args), output(layer, args), **EXACT)
    assert not any(isinstance(m, SparseWeight) for m in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training
    mine = {n: w.to_dense() for n, w in frozen_weights(frozen)}
    theirs = {n: w.to_dense() for n, w in sparse_weights(layer)}
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_and_autocast(name: str) -> None:
    layer, args = sparse(name)
    frozen = freeze(layer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mine, theirs = output(frozen, args), output(layer, args)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    double, args = layer.double(), tuple(x.double() for x in args)
    with torch.no_grad():
        torch.testing.assert_close(output(freeze(double), args), output(double, args))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_and_exports(name: str) -> None:
    layer, args = sparse(name)
    frozen = freeze(layer)
    with torch.no_grad():
        expected = output(layer, args)
        compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(output(compiled, args), expected, **EXACT)
        file = io.BytesIO()
        torch.export.save(torch.export.export(frozen, args), file)
        file.seek(0)
        program = torch.export.load(file).module()
        torch.testing.assert_close(output(program, args), expected, **EXACT)


@pytest.mark.parametrize("values", ["int8", "ternary"])
@pytest.mark.parametrize("name", NAMES)
def test_rounded_values_compute_what_their_dense_twin_does(name: str, values: Any) -> None:
    layer, args = sparse(name)
    frozen = freeze(layer, values)
    rounded = copy.deepcopy(layer)
    for path, weight in frozen_weights(frozen):
        pool = rounded.get_submodule(path)
        assert isinstance(pool, SparseWeight)
        with torch.no_grad():
            pool.values.copy_(weight.to_dense()[pool.to_dense() != 0][_order(pool)])
        assert 0 < weight.error < (0.01 if values == "int8" else 0.9)
    with torch.no_grad():
        torch.testing.assert_close(output(frozen, args), output(rounded, args), **EXACT)


def _order(pool: SparseWeight) -> Tensor:
    """Where each slot's number is among those in (row, col) order."""
    order = torch.empty_like(pool.active())
    order[pool.active()] = torch.arange(order.numel())
    return order


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(20, 30), SReLU(30), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 5)
    )
    return sparsify(model, density=0.3, exclude="4")


def test_a_whole_network_in_the_middle_of_training() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = methods.create("rigl", model, optimizer, every=1, total_steps=20)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).pow(2).mean().backward()
        optimizer.step()
        method.step()
    before = copy.deepcopy(model.state_dict())
    calls: list[Any] = []
    model[2].register_forward_hook(lambda *given: calls.append(given[0]))
    frozen = freeze(model)
    x = torch.randn(8, 20)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), **EXACT)
    assert calls[0] is frozen[2]
    assert type(frozen[4]) is nn.Linear
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    method.finalize()


def test_loads_its_own_state() -> None:
    frozen, other = freeze(network()), freeze(network())
    torch.nn.Module.load_state_dict(other, frozen.state_dict())
    x = torch.randn(3, 20)
    assert torch.equal(frozen(x), other(x))
    assert torch.equal(copy.deepcopy(frozen)(x), frozen(x))


def test_shared_weights_stay_shared() -> None:
    one = SparseLinear(6, 6, density=0.5)
    model = nn.Sequential(one, nn.ReLU(), SparseLinear.from_weight(one.weight), one)
    frozen = freeze(model)
    assert frozen[0].weight is frozen[2].weight
    assert frozen[0] is frozen[3]
    x = torch.randn(2, 6)
    torch.testing.assert_close(frozen(x), model(x).detach(), **EXACT)


def test_recurrent_layers_take_packed_sequences_and_states() -> None:
    for cls in (nn.RNN, nn.GRU, nn.LSTM):
        layer = sparsify(cls(4, 5, num_layers=2, bidirectional=True), density=0.6)
        frozen = freeze(layer)
        x = pack_sequence([torch.randn(n, 4) for n in (3, 6, 1)], enforce_sorted=False)
        with torch.no_grad():
            (y, h), (expected, state) = frozen(x), layer(x)
        torch.testing.assert_close(y.data, expected.data, **EXACT)
        torch.testing.assert_close(h, state, **EXACT)


def test_a_transformer_in_eval_mode() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model = sparsify(nn.TransformerEncoder(layer, 2), density=0.3).eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        mine, theirs = (m(x, src_key_padding_mask=padding) for m in (freeze(model), model))
    torch.testing.assert_close(mine[~padding], theirs[~padding], rtol=1e-5, atol=1e-5)


def test_files_are_smaller_than_dense_below_half_density() -> None:
    dense = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 100))
    model = sparsify(copy.deepcopy(dense), density=0.45)
    sizes = []
    for each in (dense.eval(), freeze(model), freeze(model, "int8"), freeze(model, "ternary")):
        file = io.BytesIO()
        torch.export.save(torch.export.export(each, (torch.randn(4, 300),)), file)
        sizes.append(file.tell())
    assert sizes == sorted(sizes, reverse=True)
    weights = [w for _, w in frozen_weights(freeze(model))]
    assert sum(w.nbytes for w in weights) < 4 * sum(w.shape.numel() for w in weights) * 0.7


def test_the_flop_counter_knows_frozen_products() -> None:
    layer = SparseLinear(20, 10, connections=50)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        freeze(layer)(torch.randn(7, 20))
    assert counter.get_total_flops() == 2 * 50 * 7


def test_patterns_choose_what_values_are_kept_as() -> None:
    kinds = {n: w.stored for n, w in frozen_weights(freeze(network(), {"0.*": "int8"}))}
    assert kinds == {"0.weight": "int8", "2.weight": "float"}


class Mine(SparseLinear):
    pass


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = SparseWeight((3, 4), 5)


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (lambda: nn.Linear(3, 4), "float", "no sparse weights"),
        (lambda: freeze(network()), "float", "frozen already"),
        (lambda: Mine(3, 4, density=0.5), "float", "class of its own"),
        (lambda: Bare(), "float", "pool is a sparse weight that belongs to no layer"),
        (network, "int4", "'float', 'int8', 'ternary', not 'int4'"),
        (network, {"9.*": "int8"}, "no sparse weight is called '9.*'"),
    ],
)
def test_refuses(model: Any, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        freeze(model(), values)


def test_refuses_gradients_dtypes_and_shapes() -> None:
    frozen, conv = freeze(network()), freeze(SparseConv2d(2, 3, 3, density=0.5))
    for module, shape in ((frozen, (2, 20)), (conv, (1, 2, 5, 5))):
        with pytest.raises(RuntimeError, match="no gradients"):
            module(torch.randn(shape, requires_grad=True))
        with pytest.raises(RuntimeError, match="convert one"):
            module(torch.randn(shape).double())
    with pytest.raises(RuntimeError, match=r"takes \(\.\.\., 20\)"):
        frozen(torch.randn(2, 21))
    with pytest.raises(RuntimeError, match="draws no values"):
        frozen[0].reset_parameters()
    assert rewire.densify(frozen) is frozen
    attention = freeze(SparseMultiheadAttention(4, 2, density=0.5))
    assert isinstance(attention.out_proj.weight, FrozenWeight)

"""Layers are called, copied, counted and refused as their twins in torch.nn: for every type in the
table of kinds.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
import typing
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from rewire import _native
from rewire.budget import Limits
from rewire.nn import SparseLinear, SparseWeight, SReLU, densify, sparsify
from rewire.nn.convert.kinds import KINDS
from rewire.ops import conv_kernels, flops, kernels
from twins import BY_NAME, EXAMPLES, NAMES, connections, kind, made, output


def sparse(name: str, density: float = 0.5) -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer, args = made(name)
    return sparsify(layer, density=density, distribution="uniform"), args


# --- signatures -----------------------------------------------------------------------------------


def test_every_kind_has_an_example() -> None:
    assert (
        {name.partition(",")[0] for name in EXAMPLES}
        == set(BY_NAME)
        == {k.dense.__name__ for k in KINDS}
    )


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Names and defaults of what may be given by position, in order; of the first overload if there
    are several.
    """
    overloads = typing.get_overloads(function) if hasattr(typing, "get_overloads") else []
    signature = inspect.signature(overloads[0] if overloads else function)
    return [
        (p.name, p.default)
        for p in signature.parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]


@pytest.mark.parametrize("name", BY_NAME)
def test_forward_and_constructor_take_the_arguments_of_the_twin(name: str) -> None:
    dense, twin = BY_NAME[name].dense, BY_NAME[name].sparse
    assert parameters(twin.forward) == parameters(dense.forward)
    # its own takes *args, and its overloads need Python 3.11 to be seen
    if issubclass(dense, nn.RNNBase):
        theirs = parameters(nn.RNNBase.__init__)[2:]
        mine = [p for p in parameters(twin.__init__)[1:] if p[0] != "nonlinearity"]
        assert mine == [p for p in theirs if p[0] != "proj_size" or dense is nn.LSTM]
    else:
        assert parameters(twin.__init__) == parameters(dense.__init__)


def test_activations_take_input_too() -> None:
    x = torch.randn(3, 4)
    layer = SReLU(4)
    assert torch.equal(layer(input=x), layer(x))
    assert parameters(SReLU.forward) == parameters(nn.ReLU.forward)


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_called_by_keyword(name: str) -> None:
    layer, args = sparse(name)
    names = [p for p, _ in parameters(kind(name).dense.forward)[1:]]
    y: Any = layer(**dict(zip(names, args, strict=False)))
    assert torch.equal(y[0] if isinstance(y, tuple) else y, output(layer, args))


# --- functional calls and files -------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_with_the_own_state_and_with_other_values(name: str) -> None:
    layer, args = sparse(name)
    model = nn.ModuleDict({"layer": layer})
    model.forward = lambda *a: model["layer"](*a)  # type: ignore[method-assign, assignment]
    expected = output(layer, args)
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    for state in (
        layer.state_dict(),
        dict(layer.named_parameters()),
        layer.state_dict(keep_vars=True),
    ):
        y = functional_call(layer, state, args)
        assert torch.equal(y[0] if isinstance(y, tuple) else y, expected)
    y = functional_call(model, model.state_dict(), args)
    assert torch.equal(y[0] if isinstance(y, tuple) else y, expected)
    everything = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    y = functional_call(layer, everything, args, strict=True)
    assert torch.equal(y[0] if isinstance(y, tuple) else y, expected)

    given = {n: (2 * p.detach()).requires_grad_() for n, p in layer.named_parameters()}
    y = functional_call(layer, given, args)
    (y[0] if isinstance(y, tuple) else y).square().sum().backward()
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        for n, p in dense.named_parameters():
            p.copy_(given[n])
    output(dense, args).square().sum().backward()
    for n, p in dense.named_parameters():
        assert (given[n].grad is None) == (p.grad is None)
        assert p.grad is None or torch.equal(given[n].grad, p.grad)
    assert all(p.grad is None for p in layer.parameters())
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())
    assert torch.equal(output(layer, args), expected)


def test_functional_call_with_limits_and_several_models() -> None:
    a = nn.Sequential(
        SparseLinear(6, 4, density=0.5, limits=Limits(fan_in=4)),
        nn.ReLU(),
        SparseLinear(4, 2, density=1.0),
    )
    b = copy.deepcopy(a)
    with torch.no_grad():
        for p in b.parameters():
            p.mul_(2)
    x = torch.randn(3, 6)
    assert "0.weight.limits" in a.state_dict()
    assert torch.equal(functional_call(a, a.state_dict(), (x,)), a(x))
    assert torch.equal(functional_call(a, b.state_dict(), (x,)), b(x))  # the same topology
    a[0].weight.restrict(None)
    assert "0.weight.limits" not in a.state_dict()
    assert torch.equal(functional_call(a, a.state_dict(), (x,)), a(x))


@pytest.mark.parametrize("name", NAMES)
def test_files_keep_everything_and_fit_one_shape_only(name: str, tmp_path: Path) -> None:
    layer, args = sparse(name)
    other, _ = sparse(name, 0.3)
    expected = output(layer, args)
    state = layer.state_dict()
    facts = {n for n in state if n.endswith(".shape")}
    assert len(facts) == sum(isinstance(m, SparseWeight) for m in layer.modules())
    torch.save(state, tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(output(other, args), expected)
    other, _ = sparse(name, 0.3)
    save_model(layer, str(tmp_path / "model.safetensors"))
    assert load_model(other, tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(output(other, args), expected)
    assert torch.equal(output(copy.deepcopy(layer), args), expected)
    fact = next(iter(facts))
    for strict in (True, False):
        wrong = OrderedDict(state)
        wrong[fact] = state[fact].flip(0) + 1
        with pytest.raises(RuntimeError, match="saved with shape"):
            other.load_state_dict(wrong, strict=strict)
        assert torch.equal(output(other, args), expected)
    layer.to(torch.float64)
    assert {n: b.dtype for n, b in layer.named_buffers() if n in facts} == dict.fromkeys(
        facts, torch.int64
    )


# --- flops ----------------------------------------------------------------------------------------


def uses(name: str, y: Tensor) -> int:
    """How often each connection is used: output positions of a convolution, else positions of batch
    and time.
    """
    return y.numel() // y.shape[1] if name.startswith("Conv") else y.numel() // y.shape[-1]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_flop_counter_counts_2_k_n_and_the_gradients_as_much_each(
    name: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native and not _native.available("spmm"):
        pytest.fail("the native kernels are not built")
    if not native:
        for kernel in ("_SPMM", "_SDDMM", "_SPMM_SDDMM", "_FEATURE_MAJOR", "_BATCH_MAJOR"):
            monkeypatch.setattr(kernels, kernel, None)
        monkeypatch.setattr(conv_kernels, "_NATIVE", False)
    layer, args = sparse(name)
    args = tuple(a.requires_grad_() for a in args)
    with FlopCounterMode(display=False) as counter:
        y = output(layer, args)
    n = uses(name, y)
    if name == "GRU" or "LSTM" in name or name == "RNN":
        n = args[0].shape[0] * args[0].shape[1]
    mine = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "rewire" in str(k))
    if name.startswith("MultiheadAttention"):  # queries and keys have as many positions here
        n = args[0].shape[0] * args[0].shape[1]
    assert mine == 2 * connections(layer) * n
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    mine = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "rewire" in str(k))
    assert mine == 4 * connections(layer) * n


def test_a_full_layer_counts_as_its_dense_twin() -> None:
    for name in ("Linear", "Conv1d", "Conv2d", "Conv3d"):
        dense, args = made(name)
        counts = []
        for layer in (dense, sparsify(copy.deepcopy(dense), density=1.0)):
            given = args[0].clone().requires_grad_()
            with FlopCounterMode(display=False) as counter:
                output(layer, (given,)).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


def test_the_counter_may_be_imported_after_us(monkeypatch: pytest.MonkeyPatch) -> None:
    name, finders = "torch.utils.flop_counter", list(sys.meta_path)
    monkeypatch.setattr(torch.utils, "flop_counter", sys.modules[name])  # puts it back afterwards
    monkeypatch.delitem(sys.modules, name)
    flops.announce(["spmm", "sddmm"])
    assert name not in sys.modules, (
        "importing rewire must not import the counter, which would make it slower"
    )
    assert len(sys.meta_path) == len(finders) + 1
    fresh = importlib.import_module(name)
    assert sys.meta_path == finders
    with fresh.FlopCounterMode(display=False) as counter:
        SparseLinear(6, 4, connections=12)(torch.randn(4, 6))
    assert counter.get_total_flops() == 2 * 12 * 4


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_torchscript_transforms_and_data_parallel_are_refused_in_one_sentence(name: str) -> None:
    layer, args = sparse(name)
    expected = output(layer, args)
    model = nn.Sequential(layer)
    with pytest.raises(
        RuntimeError,
        match=r"torch\.jit\.trace cannot record "
        r"Sparse.*torch\.export\.export",
    ):
        torch.jit.trace(layer, args)
    for thing in (layer, model):
        with pytest.raises(
            RuntimeError,
            match=r"torch\.jit\.script cannot record "
            r"Sparse.*torch\.export\.export",
        ):
            torch.jit.script(thing)
    with pytest.raises(
        RuntimeError,
        match=r"DataParallel cannot replicate "
        r"Sparse.*DistributedDataParallel",
    ):
        # what torch.nn.parallel.replicate calls, on devices there are not here
        layer._replicate_for_data_parallel()
    stacked = tuple(torch.stack([a, a]) for a in args)
    with pytest.raises(RuntimeError, match=r"not work inside torch\.vmap.*torch\.autograd\.grad"):
        torch.vmap(layer)(*stacked)
    values = dict(layer.named_parameters())
    with pytest.raises(RuntimeError, match=r"not work inside torch\.vmap.*torch\.autograd\.grad"):
        torch.func.grad(lambda v: _first(functional_call(layer, v, args)).sum())(values)
    several, buffers = torch.func.stack_module_state([layer, copy.deepcopy(layer)])
    with pytest.raises(RuntimeError, match=r"stack_module_state"):
        torch.vmap(lambda p, b: functional_call(layer, (p, b), args))(several, buffers)
    assert torch.equal(output(layer, args), expected)


def _first(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_the_refusals_recommend_works() -> None:
    model = nn.Sequential(
        SparseLinear(6, 4, density=0.5), nn.ReLU(), SparseLinear(4, 2, density=0.5)
    ).eval()
    x = torch.randn(3, 6)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    values = dict(model.named_parameters())
    found = torch.autograd.grad(functional_call(model, values, (x,)).sum(), list(values.values()))
    model(x).sum().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(found, values.values(), strict=True))
    dense = densify(copy.deepcopy(model))
    torch.testing.assert_close(torch.jit.trace(dense, x)(x), model(x))

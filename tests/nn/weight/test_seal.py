"""Positions that are written behind a pool's back: the next forward pass says so, unless they are
what they were.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn, optim
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, update_bn

import rewire
from rewire.nn import (
    SparseConv1d,
    SparseGRU,
    SparseLinear,
    SparseMultiheadAttention,
    SparseWeight,
    sparse_weights,
)
from rewire.topology import TopologyError

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))


def make(seed: int = 0) -> nn.Sequential:
    g = torch.Generator().manual_seed(seed)
    return nn.Sequential(
        SparseLinear(12, 10, density=0.3, generator=g),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        SparseLinear(10, 4, density=0.5, generator=g),
    )


def train(
    model: nn.Module,
    optimizer: optim.Optimizer,
    method: rewire.methods.Method,
    after: Callable[[], object],
) -> None:
    """Twelve steps, rewired (or not) after every fourth."""
    for step in range(12):
        optimizer.zero_grad()
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        method.step()
        after()
        if step % 4 == 3:
            method.end_epoch()


def over_state_dict(average: nn.Module, model: nn.Module) -> None:
    for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        a.copy_(0.75 * a + 0.25 * b)  # of equal integers exact


def values_and_then_buffers(average: nn.Module, model: nn.Module) -> None:
    for a, b in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(b, 0.25)
    for a, b in zip(average.buffers(), model.buffers(), strict=True):
        a.copy_(b)


def everything(average: nn.Module, model: nn.Module) -> None:
    for a, b in zip(
        [*average.parameters(), *average.buffers()],
        [*model.parameters(), *model.buffers()],
        strict=True,
    ):
        a.copy_(b)


BY_HAND = [over_state_dict, values_and_then_buffers, everything]


@pytest.mark.parametrize("method", ["static", "set", "deep-r", "rigl"])
@pytest.mark.parametrize(
    "way", [*BY_HAND, False, True], ids=lambda w: getattr(w, "__name__", f"AveragedModel-{w}")
)
def test_averages_are_refused_where_connections_have_moved(
    method: str, way: Callable[..., None] | bool
) -> None:
    model = make()
    options = (
        {"every": 4}
        if method == "rigl"
        else {"l1": 0.05, "noise": 0.1}
        if method == "deep-r"
        else {}
    )
    optimizer = optim.SGD(model.parameters(), 0.1)
    acting = rewire.methods.create(method, model, optimizer, seed=0, **options)
    averaged = (
        AveragedModel(model, use_buffers=way) if isinstance(way, bool) else copy.deepcopy(model)
    )

    @torch.no_grad()
    def average() -> None:
        averaged.update_parameters(model) if isinstance(way, bool) else way(averaged, model)

    train(model, optimizer, acting, average)
    average()
    if method == "static":
        assert torch.isfinite(averaged(X)).all()
        return
    for _ in range(2):  # not once only
        with pytest.raises(TopologyError, match=r"written by other code.*rewire\.ema"):
            averaged(X)
    with pytest.raises(TopologyError, match="written by other code"):
        copy.deepcopy(averaged)
    inner = averaged.module if isinstance(way, bool) else averaged
    weight = inner[0].weight
    for read in (
        weight.to_dense,
        weight.coo,
        weight.reorder,
        lambda: weight.resize(60),
        lambda: averaged.to("cpu"),
    ):
        with pytest.raises(TopologyError, match="written by other code"):
            read()
    inner.load_state_dict(model.state_dict())
    model.eval(), averaged.eval()
    assert torch.equal(averaged(X), model(X))


def test_averages_of_a_static_model_are_right() -> None:
    model = make()
    optimizer = optim.SGD(model.parameters(), 0.1)
    method = rewire.methods.Static(model, optimizer)
    averaged = AveragedModel(model)
    expected = [torch.zeros_like(p) for p in model.parameters()]

    def average() -> None:
        averaged.update_parameters(model)
        for total, p in zip(expected, model.parameters(), strict=True):
            total += p.detach() / 12

    train(model, optimizer, method, average)
    for p, wanted in zip(averaged.module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), wanted)
    update_bn([torch.randn(8, 12)], averaged)
    dense = copy.deepcopy(averaged.module)
    rewire.densify(dense)
    torch.testing.assert_close(dense(X), averaged(X))


@pytest.mark.parametrize("layer", ["linear", "conv", "gru", "attention"])
def test_every_layer_type_looks(layer: str) -> None:
    x = torch.randn(2, 4, 4)
    made: nn.Module = {
        "linear": lambda: SparseLinear(4, 8, density=0.5),
        "conv": lambda: SparseConv1d(4, 8, 3, density=0.3),
        "gru": lambda: SparseGRU(4, 8, density=0.3),
        "attention": lambda: SparseMultiheadAttention(4, 2, density=0.5),
    }[layer]()
    inputs = (x, x, x) if layer == "attention" else (x,)
    for _, weight in sparse_weights(made):
        weight.cols.copy_(weight.cols.flip(0))
        with pytest.raises(TopologyError, match="written by other code"):
            made(*inputs)
        weight.cols.copy_(weight.cols.flip(0))
        made(*inputs)  # as it was


def test_other_tensors_for_the_same_topology_are_fine() -> None:
    model = make().eval()
    weight = model[0].weight
    y = model(X)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    clones = {name: t.detach().clone() for name, t in tensors.items()}
    assert torch.equal(functional_call(model, clones, (X,)), y)
    assert torch.equal(
        functional_call(model, {k: v for k, v in clones.items() if "_" not in k}, (X,)), y
    )
    assert torch.equal(model(X), y)
    other = make(1).eval()  # another topology, complete with its lists
    theirs = dict(other.named_parameters()) | dict(other.named_buffers())
    assert torch.equal(functional_call(model, theirs, (X,)), other(X))
    with pytest.raises(TopologyError, match="written by other code"):
        functional_call(model, theirs | {"0.weight.row_slots": weight.row_slots}, (X,))
    assert torch.equal(model(X), y)
    model.double()
    torch.testing.assert_close(model(X.double()).float(), y)
    assert weight.values.dtype == torch.float64


def test_where_nothing_can_be_read() -> None:
    with torch.device("meta"):
        meta = make()
    assert meta(X.to("meta")).shape == (5, 4)
    assert copy.deepcopy(meta).to_empty(device="cpu")[0].weight.device.type == "cpu"
    with torch.inference_mode():
        model = make().eval()
        y = model(X)
        assert torch.equal(copy.deepcopy(model)(X), y)
    outside = copy.deepcopy(make().eval())
    with torch.inference_mode():
        assert torch.equal(outside(X), y)
    stacked = {
        n: torch.stack([p.detach()] * 2) for n, p in outside.named_parameters() if "weight" not in n
    }
    batched = torch.func.vmap(lambda p: functional_call(outside, p, (X,)), randomness="error")
    # the products have no rule for vmap
    with pytest.raises((RuntimeError, NotImplementedError)) as error:
        batched(stacked)
    assert not isinstance(error.value, TopologyError)


def test_pickles_and_files_note_what_they_hold() -> None:
    model = make()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    fresh = make(3)
    fresh.load_state_dict(model.state_dict())
    rewire_one(model[0].weight)
    for other in (again, fresh):
        with torch.no_grad():
            values_and_then_buffers(other, model)
        with pytest.raises(TopologyError, match="written by other code"):
            other(X)


def rewire_one(weight: SparseWeight) -> None:
    free = (weight.to_dense() == 0).nonzero()[:1]
    weight.rewire(torch.tensor([3]), free[:, 0], free[:, 1], 0.5)


def test_an_average_of_files_says_what_is_wrong() -> None:
    one, two = make(0).state_dict(), make(1).state_dict()
    mixed = {
        k: (v + two[k]) / 2 if v.is_floating_point() else (v + two[k]) // 2 for k, v in one.items()
    }
    for average in (mixed, {k: (v.float() + two[k].float()) / 2 for k, v in one.items()}):
        with pytest.raises(RuntimeError, match=r"an average of state_dicts.*rewire\.ema"):
            make().load_state_dict(average)


def test_what_the_pool_does_itself_is_no_breach() -> None:
    model = make()
    weight = model[0].weight
    twin: Tensor = copy.deepcopy(model)(X)
    for change in (
        lambda: rewire_one(weight),
        weight.reorder,
        lambda: weight.resize(50),
        lambda: weight.draw(torch.Generator().manual_seed(4)),
        lambda: model.load_state_dict(make(5).state_dict()),
    ):
        change()
        model(X)
        weight.coo()
    assert twin.shape == (5, 4)

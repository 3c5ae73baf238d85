"""Networks of many kinds: what is cut computes the same in both modes, what is not is refused by
name, untouched.
"""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rewire.methods import Differentiable, NoiseOut
from rewire.nn.forward.modes import rehearsing
from rewire.nn.forward.tensors import tensors_in
from rewire.nn.surgery import UnitGraph, fold
from rewire.nn.surgery.sides import axes
from rewire.nn.surgery.trace import call
from zoo import ZOO

pytest.importorskip("torch_pruning")
all_networks = pytest.mark.parametrize("name", ZOO)


def made(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    build, x = ZOO[name][:2]
    return build(), x


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    """All outputs in eval and in training mode, with dropout and the like at their expectation."""
    found = []
    for train in (False, True):
        with rehearsing(model, train=train):
            found += [
                t.detach().clone()
                for t in tensors_in(call(model, x if count(x) > 1 else torch.cat([x, x])))
            ]
    return [t for t in found if t.is_floating_point()]


def count(x: Any) -> int:
    return x.shape[0] if isinstance(x, Tensor) else 2


def everything(model: nn.Module) -> tuple[Any, ...]:
    """What must not change: values, modes, hooks, gradients' switches, and all random numbers to
    come.
    """
    state = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), m.training, "forward" in vars(m))
        for m in model.modules()
    ]
    wanted = [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
    chance = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    return state, hooks, wanted, chance


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    now = everything(model)
    assert now[1:] == before[1:]
    assert now[0].keys() == before[0].keys()
    assert all(torch.equal(now[0][key], before[0][key]) for key in now[0])


@all_networks
def test_every_layer_is_cut_or_refused_by_name(name: str) -> None:
    model, x = made(name)
    cut, refused = ZOO[name][2:]
    before = everything(model)
    graph = UnitGraph(model, x)
    found = {layer: graph.refusal(layer) for layer in dict.fromkeys([*graph.names, *cut, *refused])}
    assert_untouched(model, before)
    assert sorted(layer for layer, reason in found.items() if reason is None) == sorted(cut)
    for layer, reason in found.items():
        if reason is not None:
            assert layer in reason
            assert re.search(refused[layer], reason), reason
            assert "\n" not in reason
            assert "torch-pruning" not in reason


def make_alike(graph: UnitGraph, layer: str, unit: int, like: int) -> None:
    """Give a unit all that another has, wherever its group makes it or treats it by itself."""
    group = graph.group(layer)
    with torch.no_grad():
        for site in [*group.producers, *group.followers]:
            at, source = (graph.positions(site, torch.tensor([u]))[0] for u in (unit, like))
            for axis in axes(site.module, "out"):
                tensor = getattr(site.module, axis.name)
                if tensor is None or (axis.name == "weight_hh_l0" and axis.dim == 1):
                    continue
                for block in range(axis.blocks):
                    offset = block * (tensor.shape[axis.dim] // axis.blocks)
                    tensor.index_copy_(
                        axis.dim, at + offset, tensor.index_select(axis.dim, source + offset)
                    )


@all_networks
def test_units_that_are_alike_merge_without_a_trace(name: str) -> None:
    """In training and in eval mode, of every layer that can be cut, one after the other through one
    graph.
    """
    model, x = made(name)
    if not ZOO[name][2]:
        return
    graph = UnitGraph(model, x)
    coarse = any(p.dtype == torch.bfloat16 for p in model.parameters()) or name == "autocast"
    for layer in ZOO[name][2]:
        make_alike(graph, layer, 1, 3)
        before = outputs(model, x)
        group = graph.group(layer)
        recurrent = [s for s in group.producers if isinstance(s.module, nn.RNNBase)]
        for site in [*group.consumers, *recurrent]:
            fold(graph, group, site, torch.tensor(1), 0.0, torch.tensor(3), 1.0)
        graph.remove({layer: [1]})
        assert graph.count(layer) == len(group.alive) < group.size
        after = outputs(model, x)
        assert len(before) == len(after) > 0
        for a, b in zip(before, after, strict=True):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) <= (0.1 if coarse else 1e-5) * max(
                1.0, float(a.abs().max())
            )


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name][2]])
def test_noise_out_merges_in_every_network(name: str) -> None:
    """Two layers' duplicates are found by the method itself, training goes on, and scores and
    random numbers stay.
    """
    model, x = made(name)
    # with one sample every unit is constant
    x = x if count(x) > 1 else torch.randn(6, *x.shape[1:])
    cut = ZOO[name][2]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.is_floating_point()], lr=1e-3)
    before = everything(model)
    method = NoiseOut(
        model,
        optimizer,
        data=[(x,)],
        targets="none",
        required_score=0.0,
        at_once=1,
        only=cut[0],
        seed=0,
    )
    assert_untouched(model, before)
    graph: UnitGraph = method._graph
    make_alike(graph, cut[0], 1, 3)
    expected = outputs(model, x)

    def train() -> None:
        model.train()
        found = tensors_in(call(model, x))
        loss = sum((t.float().square().mean() for t in found if t.requires_grad), torch.zeros(()))
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        method.step()

    optimizer.param_groups[0]["lr"] = 0.0
    train()
    expected = outputs(model, x)
    method.end_epoch(lambda net: 1.0)
    assert method.stats()["merged"][cut[0]] == 1
    exact = not any(p.dtype == torch.bfloat16 for p in model.parameters()) and name != "autocast"
    for a, b in zip(expected, outputs(model, x), strict=True):
        assert a.shape == b.shape
        assert not exact or float((a - b).abs().max()) <= 1e-4 * max(1.0, float(a.abs().max()))
    train()
    method.finalize()


@pytest.mark.parametrize(
    "name", [name for name in ZOO if name not in ("compiled", "head in eval only")]
)
def test_differentiable_takes_out_what_is_off_or_says_why_not(name: str) -> None:
    """Units that are off are gone at the end, where that can be; the function is the same in both
    modes.
    """
    model, x = made(name)
    x = x if count(x) > 1 else torch.randn(6, *x.shape[1:])
    gated = [n for n, m in model.named_modules() if type(m) is nn.Linear and n in ZOO[name][2]]
    if not gated or (model.training and not any(p.requires_grad for p in model.parameters())):
        return
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    method = Differentiable(model, optimizer, units=gated, data=[(x,)], strength=0.0, seed=0)
    with torch.no_grad():
        for target in method.targets:
            target.parameters()[1][2] = 0.0
    sizes = {layer: model.get_submodule(layer).out_features for layer in gated}
    before = outputs(model, x)
    chance = everything(model)[3]
    method.finalize()
    assert everything(model)[3] == chance
    after = outputs(model, x)
    coarse = any(p.dtype == torch.bfloat16 for p in model.parameters()) or name in (
        "autocast",
        "chance",
    )
    for a, b in zip(before, after, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= (0.1 if coarse else 1e-5) * max(
            1.0, float(a.abs().max())
        )
    for layer in gated:
        linear = model.get_submodule(layer)
        assert (
            linear.out_features == sizes[layer] - 1
            or layer in method.stats()["refused"]
            or not linear.weight[2].any()
        )


@all_networks
def test_differentiable_refuses_by_name_before_anything_changed(name: str) -> None:
    model, x = made(name)
    for layer in ZOO[name][3]:
        if type(model.get_submodule(layer)) is not nn.Linear:
            continue
        optimizer = torch.optim.Adam(model.parameters())
        before = everything(model)
        with pytest.raises(ValueError, match=layer) as caught:
            Differentiable(model, optimizer, units=layer, data=[(x,)])
        assert re.search(f"{ZOO[name][3][layer]}|shares its", str(caught.value))
        assert_untouched(model, before)
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(
            list(model.parameters())
        )

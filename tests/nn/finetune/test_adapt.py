"""`rewire.adapt`: what it leaves as it was, and what training then moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import rewire
from adapted import ids, loss_of, network, train
from rewire.methods.criteria.activations import Recorder
from rewire.nn.layers.adapted import Adapted

# --- what stays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_objects_and_names_stay(dtype: torch.dtype, training: bool) -> None:
    model = network(dtype).train(training)
    twin = copy.deepcopy(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    places = {name: p.data_ptr() for name, p in parameters.items()}
    seen: list[nn.Module] = []
    model.up.register_forward_hook(lambda module, *_: seen.append(module))
    adapter = rewire.adapt(model, density=0.2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids()), twin(ids()))
    assert seen == [model.up]
    assert {n: m for n, m in model.named_modules() if n in modules} == modules
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter
        assert parameter.data_ptr() == places[name]
        assert not parameter.requires_grad
    added = model.state_dict().keys() - twin.state_dict().keys()
    assert {key.rpartition(".")[0] for key in added} == {
        f"{name}.difference.weight" for name in adapter.differences
    }
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    assert sorted(adapter.differences) == sorted(
        n for n, m in modules.items() if type(m) in kinds or isinstance(m, Adapted)
    )
    sizes = sum(model.get_submodule(n).weight.numel() for n in adapter.differences)
    assert adapter.connections == round(0.2 * sizes)
    assert "6 layers" in repr(adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in adapter.parameters()}
    assert all(not bool(p.any()) and p.dtype == dtype for p in trained)


@pytest.mark.parametrize("autocast", [True, False])
def test_narrow_bases_have_wide_differences(autocast: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)
    twin, x = copy.deepcopy(model), torch.randn(8, 16, dtype=dtype)
    adapter = rewire.adapt(model, density=0.2)
    optimizer = torch.optim.Adam(adapter.parameters(), 0.01)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
        assert torch.equal(out, twin(x))
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapter.parameters())
    optimizer.step()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        adapted = model(x).float()
        merged = adapter.merge()(x).float()
    assert next(merged for merged in model.parameters()).dtype == dtype
    assert (adapted - twin(x).float()).abs().max() > 0.05
    assert torch.allclose(adapted, merged, atol=0.03)


def test_a_weight_that_is_shared_stays_so() -> None:
    model = network()
    with pytest.raises(
        ValueError, match=r"embedding\.weight cannot be trained .* because head has"
    ):
        rewire.adapt(model, density=0.2, train="embedding.*")
    adapter = rewire.adapt(model, density=0.2)
    embedded = model.embedding(ids())
    train(model, adapter)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.embedding(ids()), embedded)
    assert bool(adapter.differences["head"].values.any())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"head\.weight is embedding\.weight too.*leave it unmerg"):
        adapter.merge()
    assert adapter.state == "beside"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert type(adapter.detach().head) is nn.Linear
    assert model.head.weight is model.embedding.weight


def test_a_layer_with_two_names_has_one_difference() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    adapter = rewire.adapt(model, density=0.5)
    assert list(adapter.differences) == ["0"]
    assert model[0] is model[2] is layer


def test_a_model_that_is_a_layer() -> None:
    layer = nn.Linear(6, 3)
    adapter = rewire.adapt(layer, connections=4)
    assert adapter.model is layer
    assert isinstance(layer, Adapted)
    assert list(adapter.differences) == [""]
    assert type(adapter.detach()) is nn.Linear


# --- training -------------------------------------------------------------------------------------


def test_training_is_that_of_a_masked_dense_difference() -> None:
    """Against torch alone: a dense difference whose gradient is masked, in float64."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    model = copy.deepcopy(base)
    adapter = rewire.adapt(model, density=0.3, train="2.bias")
    pools = adapter.differences
    masks = {
        name: torch.zeros(pool.shape, dtype=torch.float64).index_put(
            pool.coo()[:2], torch.ones(()).double()
        )
        for name, pool in pools.items()
    }
    dense = {name: nn.Parameter(torch.zeros_like(mask)) for name, mask in masks.items()}
    bias = nn.Parameter(base[2].bias.detach().clone())
    mine = torch.optim.Adam(adapter.parameters(), 0.02)
    theirs = torch.optim.Adam([*dense.values(), bias], 0.02)
    state = {name: p.detach() for name, p in base.named_parameters()}
    for step in range(10):
        x = torch.randn(16, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        weights = {f"{n}.weight": state[f"{n}.weight"] + dense[n] * masks[n] for n in masks}
        outputs = model(x), functional_call(base, state | weights | {"2.bias": bias}, x)
        assert torch.allclose(*outputs, rtol=0, atol=1e-12)
        for optimizer, out in zip((mine, theirs), outputs, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(out, torch.arange(16) % 4).backward()
            optimizer.step()
    for name, pool in pools.items():
        assert torch.allclose(pool.to_dense(), (dense[name] * masks[name]).detach(), atol=1e-12)
        assert torch.equal(model.get_parameter(f"{name}.weight"), state[f"{name}.weight"])
    assert torch.allclose(model[2].bias, bias, atol=1e-12)


def test_rigl_drops_what_moved_least_and_grows_where_the_gradient_of_the_base_is_largest() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    model = copy.deepcopy(base)
    adapter = rewire.adapt(model, connections={"0": 40}, generator=torch.Generator().manual_seed(0))
    pool = adapter.differences["0"]
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    method = rewire.methods.RigL(model, optimizer, every=3, fraction=0.5, candidates=None, until=90)
    for step in range(3):
        x = torch.randn(16, 10, dtype=torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(16) % 4).backward()
        if step == 2:
            rows, cols, values = (t.detach().clone() for t in pool.coo())
            weight = (base[0].weight.detach() + pool.to_dense().detach()).requires_grad_()
            out = functional_call(base, {"0.weight": weight}, x)
            [gradient] = torch.autograd.grad(F.cross_entropy(out, torch.arange(16) % 4), weight)
        optimizer.step()
        method.step()
    count = method.stats()["grown"]["0.difference.weight"]
    assert 15 < count <= 20
    kept = values.abs().argsort(descending=True)[: 40 - count]
    mask = torch.zeros(20, 10, dtype=torch.bool)
    mask[rows[kept], cols[kept]] = True
    scores = gradient.abs().masked_fill(mask, -1).flatten()
    mask.view(-1)[scores.topk(count).indices] = True
    assert torch.equal(pool.to_dense() != 0, mask & (pool.to_dense() != 0))
    found = torch.zeros_like(mask)
    found[pool.coo()[:2]] = True
    assert torch.equal(found, mask)


def test_similarities_are_of_what_a_layer_gives_with_its_difference() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4))
    adapter = rewire.adapt(model, density=0.3)
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    method = rewire.methods.SET(model, optimizer)
    with torch.no_grad():
        for pool in adapter.differences.values():
            pool.values.normal_()
    x = torch.randn(7, 10)
    pairs, output = Recorder(model, [x]).record(method.pools, 0, 0)
    with torch.no_grad():
        hidden = model[0](x)
        assert torch.equal(pairs[0][0].x, x)
        assert torch.equal(pairs[0][0].g, hidden)
        assert torch.equal(pairs[1][0].x, hidden)
        assert torch.equal(pairs[1][0].g, model[2](hidden.relu()))
    assert output == 1


METHODS = [
    name
    for name in rewire.methods.available()
    if (info := rewire.methods.info(name)).memory == "O(K)" or info.cls.starts_dense
]
DENSE = {"differentiable", "halo", "noiseout", "ternary"}


@pytest.mark.filterwarnings("ignore:.*made no update")
@pytest.mark.parametrize("name", METHODS)
def test_methods_move_differences_and_nothing_else(name: str) -> None:
    info = rewire.methods.info(name)
    model = network()
    before = copy.deepcopy(model.state_dict())
    adapter = rewire.adapt(model, density=info.start_density or 0.1, exclude="volume")
    assert info.cls.starts_dense == (name in DENSE)
    if name in DENSE:
        with pytest.raises(ValueError, match=r"starts from dense layers.*merge\(\) the adapter"):
            rewire.methods.create(name, model, torch.optim.SGD(adapter.parameters(), 0.1))
        return
    optimizer = torch.optim.SGD(adapter.parameters(), 0.5)
    options: dict[str, Any] = {"data": [ids()]} if info.takes_data else {}
    options |= {"density": 0.1} if info.takes_budget else {}
    options |= {"every": 2} if "every" in info.parameters() else {}
    options |= {"until": 8} if "until" in info.parameters() and info.takes_budget else {}
    method = rewire.methods.create(name, model, optimizer, seed=0, **options)
    first = loss_of(model, ids()).item()
    for epoch in range(3):
        for _ in range(4):
            loss = loss_of(model, ids()) + method.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.step()
        method.end_epoch(last=epoch == 2)
    method.finalize()
    assert loss_of(model, ids()).item() < first
    now = model.state_dict()
    assert all(
        torch.equal(now[k], v)
        for k, v in before.items()
        if not k.startswith("norm.runn") and not k.startswith("norm.num")
    )
    adapter.detach()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_snip_cannot_rank_what_is_zero() -> None:
    model = network()
    adapter = rewire.adapt(model, density=1.0)
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"SNIP ranks .* all values are 0.*rewire\.adapt.*RigL"):
        rewire.methods.create("snip", model, optimizer, density=0.1)

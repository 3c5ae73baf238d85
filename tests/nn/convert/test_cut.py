"""Cut layers train on exactly as their masked dense twins, whatever the layer and the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import prune
from torch.optim import Optimizer

import rewire
from masked import MODELS, OPTIMIZERS, made, masks_of, train
from rewire.nn import SparseLinear, SparseMultiheadAttention, sparse_weights, to_sparse
from rewire.nn.convert.cut import dense_weights


def dense_values(model: nn.Module) -> dict[str, Tensor]:
    dense = rewire.densify(copy.deepcopy(model))
    return {name: p.detach() for name, p in dense.named_parameters()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on_as_that_of_the_masked_dense_model(name: str, optimizer: str) -> None:
    kind, options = OPTIMIZERS[optimizer]
    twin, model = made(name), made(name)
    masks = masks_of(model)
    runs: list[tuple[nn.Module, Optimizer]] = []
    for m in (twin, model):
        o: Optimizer = getattr(optim, kind)(m.named_parameters(), **options)
        train(m, o, range(4))
        runs.append((m, o))
    with torch.no_grad():
        for n, _, _, w in dense_weights(twin):
            w[~masks[n]] = 0
    kept = {n: int(m.sum()) for n, m in masks.items()}

    others = {
        n: p
        for n, p in model.named_parameters()
        if n not in masks and not n.endswith("in_proj_weight")
    }
    cut = to_sparse(model, masks, runs[1][1])
    assert cut is model
    pools = dict(sparse_weights(model))
    assert {n: p.connections for n, p in pools.items()} == kept
    now = dict(model.named_parameters())
    assert all(now[n] is p for n, p in others.items()), "other parameters stay the objects they are"
    trained = [p for g in runs[1][1].param_groups for p in g["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()}
    assert len(trained) == len(now)
    assert {n: id(p) for n, p in now.items()} == dict(
        zip(runs[1][1].param_groups[0]["param_names"], map(id, trained), strict=True)
    )
    assert set(runs[1][1].state) <= set(trained)
    for n, value in dense_values(model).items():
        assert torch.equal(value, dict(twin.named_parameters())[n]), n

    train(*runs[0], range(4, 9), masked=masks)
    train(*runs[1], range(4, 9))
    expected = dict(twin.named_parameters())
    for n, value in dense_values(model).items():
        torch.testing.assert_close(value, expected[n].detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["linear", "conv", "attention"])
def test_adafactor_gets_its_estimate_multiplied_out(name: str) -> None:
    model = made(name)
    optimizer = optim.Adafactor(model.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    masks = masks_of(model)
    before = {
        n: s["row_var"] @ s["col_var"] / s["row_var"].mean(-2, keepdim=True)
        for n, p in model.named_parameters()
        if "row_var" in (s := optimizer.state[p])
    }
    to_sparse(model, masks, optimizer)
    pools = dict(sparse_weights(model))
    for n, mask in masks.items():
        estimate = (
            before[n]
            if n in before
            else before["attention.in_proj_weight"].chunk(3)["qkv".index(n[10])]
        )
        torch.testing.assert_close(optimizer.state[pools[n].values]["variance"], estimate[mask])
    train(model, optimizer, range(3, 5))


def test_gradients_hooks_mode_frozen_and_groups_are_kept() -> None:
    model = made("linear")
    first, last = model[0], model[2]  # type: ignore[index]
    first.weight.requires_grad_(False)
    last.eval()
    calls: list[str] = []
    handle = last.register_forward_hook(
        lambda module, args, output: calls.append(type(module).__name__)
    )
    optimizer = optim.SGD(
        [{"params": [last.weight], "lr": 0.5}, {"params": [first.bias], "lr": 0.25}], momentum=0.9
    )
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    train(model, optimizer, range(1))
    masks = masks_of(model)
    gradient = last.weight.grad[masks["2.weight"]]
    to_sparse(model, masks, [optimizer])
    scheduler.step()
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 1]
    values = model[2].weight.values  # type: ignore[index]
    assert optimizer.param_groups[0]["params"][0] is values
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert torch.equal(values.grad, gradient)
    assert not model[0].weight.values.requires_grad  # type: ignore[index]
    assert not model[2].training  # type: ignore[index]
    calls.clear()
    model(torch.ones(1, 12, dtype=torch.float64))
    assert calls == ["SparseLinear"]
    handle.remove()
    model(torch.ones(1, 12, dtype=torch.float64))
    assert calls == ["SparseLinear"]


@pytest.mark.parametrize("name", MODELS)
def test_empty_weights_leave_the_bias_and_train_on(name: str) -> None:
    twin, model = made(name), made(name)
    masks = masks_of(model)
    masks = {n: torch.zeros_like(m) if i == 0 else m for i, (n, m) in enumerate(masks.items())}
    with torch.no_grad():
        for n, _, _, w in dense_weights(twin):
            w[~masks[n]] = 0
    optimizer = optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.5)
    train(model, optimizer, range(2))
    model.load_state_dict(twin.state_dict())
    to_sparse(model, masks, optimizer)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x))
    emptied = dict(sparse_weights(model))[next(iter(masks))]
    assert (emptied.connections, emptied.capacity) == (0, 1)
    assert optimizer.state[emptied.values]["sum"].tolist() == [0.5]
    train(model, optimizer, range(2))
    assert not emptied.values.any()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)
    assert torch.equal(copied(x), model(x))


def test_masked_in_zeros_stay_and_unmasked_weights_of_a_layer_stay_complete() -> None:
    layer = nn.LSTM(4, 6)
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    x = torch.randn(3, 2, 4)
    expected = layer(x)[0]
    made = to_sparse(layer, {"weight_hh_l0": torch.ones(24, 6, dtype=torch.bool)})
    counts = {n: w.connections for n, w in sparse_weights(made)}
    assert counts == {"weight_ih_l0": 96, "weight_hh_l0": 144}
    torch.testing.assert_close(made(x)[0], expected)


def test_no_random_numbers_are_used_and_encoders_still_work() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2
    ).eval()
    masks = masks_of(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for n, _, _, w in dense_weights(twin):
            w[~masks[n]] = 0
    before = torch.get_rng_state()
    to_sparse(model, masks)
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(model.layers[0].self_attn, SparseMultiheadAttention)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 6))
    prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[no-untyped-call]
    return model


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 6))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def yes(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "none": (lambda: made("linear"), {}, "nothing to cut"),
    "name": (
        lambda: made("linear"),
        {"3": yes(6, 16)},
        "'3' is not a weight that can be cut: there are '0.weight'",
    ),
    "shape": (
        lambda: made("linear"),
        {"0": yes(12, 16)},
        r"mask of 0 must be a boolean tensor of "
        r"shape \(16, 12\)",
    ),
    "dtype": (lambda: made("linear"), {"0": torch.ones(16, 12)}, "not torch.float32"),
    "list": (lambda: made("linear"), {"0": [[True]]}, "not list"),
    "twice": (
        lambda: made("linear"),
        {"0": yes(16, 12), "0.weight": yes(16, 12)},
        "two masks are for 0.weight",
    ),
    "shared": (Shared, {"a": yes(5, 5)}, "a shares its weight with b.weight"),
    "pruned": (pruned, {"0": yes(6, 12)}, "the mask of 0.weight is not the prune mask"),
    "parametrized": (
        parametrized,
        {"0": yes(6, 12)},
        "0 has a parametrization of weight .*remove_parametrizations",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_before_anything_changed(case: str) -> None:
    build, masks, message = REFUSED[case]
    model = build()
    modules, parameters = list(model.modules()), list(model.parameters())
    optimizer = optim.SGD(parameters, lr=0.1)
    with pytest.raises(ValueError, match=message):
        to_sparse(model, masks, optimizer)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, optimizer.param_groups[0]["params"], strict=True))


class Odd(optim.SGD):
    """Keeps one number per row."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["rows"] = torch.ones(p.shape[:1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: optim.LBFGS(m.parameters()), "LBFGS cannot train sparse weights"),
        (
            lambda m: optim.Muon([p for p in m.parameters() if p.dim() == 2]),
            "Muon cannot train sparse weights",
        ),
        (lambda m: Odd(m.parameters(), lr=0.1), r"Odd keeps rows of shape \(16,\)"),
    ],
)
def test_optimizers_that_cannot_follow_are_refused_before_anything_changed(
    make: Callable[[nn.Module], Optimizer], message: str
) -> None:
    model = made("linear")
    optimizer = make(model)
    if isinstance(optimizer, Odd):
        optimizer.step()
    before = list(model.parameters())
    with pytest.raises(ValueError, match=message):
        to_sparse(model, masks_of(model), optimizer)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    if isinstance(optimizer, optim.Muon):  # what it does not train may be cut
        optimizer = optim.Muon([model[0].weight])  # type: ignore[index]
        to_sparse(model, {"2": yes(6, 16)}, optimizer)
        assert isinstance(model[2], SparseLinear)  # type: ignore[index]

"""Differentiable sparsification: what the network computes, what is taken out, what the optimizer
keeps.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rewire
from rewire.methods import Differentiable
from rewire.nn import Absent, SparseLinear

pytest.importorskip("torch_pruning")


def mlp(act: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16), act or nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def convnet(padding: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=padding),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=padding),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(12, 8)
        self.bodies = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for body in self.bodies:
            x = x + body(torch.relu(x))
        return self.head(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, 3, 8)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def train(
    model: nn.Module,
    optimizer: Any,
    method: Any,
    shape: tuple[int, ...],
    steps: int,
    begin: int = 0,
) -> None:
    for step in range(begin, begin + steps):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(8, *shape, generator=g)
        y = torch.randint(0, 3, (8,), generator=g)
        loss = nn.functional.cross_entropy(model(x), y)
        if method is not None:
            loss = loss + method.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if method is not None:
            method.step()


def off(method: Differentiable, number: int, dead: list[int]) -> None:
    """Switch components of a gate off by hand."""
    with torch.no_grad():
        method.targets[number].parameters()[1].index_fill_(0, torch.tensor(dead), 0.0)


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.Sigmoid(), nn.Tanh()], ids=["relu", "sigmoid", "tanh"]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_units_are_removed_and_the_function_stays(act: nn.Module, optimizer: str) -> None:
    """A unit that is off gives sigmoid(0) = 1/2 to the next layer, which must get it in its
    bias.
    """
    model = mlp(act)
    opt = OPTIMIZERS[optimizer](model.parameters())
    method = Differentiable(model, opt, seed=1)
    train(model, opt, method, (12,), 3)
    off(method, 0, [0, 5, 6])
    off(method, 1, [2])
    x = torch.randn(9, 12)
    before = model(x)
    assert method.stats()["components"] == {"0": (13, 16), "2": (7, 8)}
    assert method.finalize() is model
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-5)
    assert [tuple(m.weight.shape) for m in model if isinstance(m, nn.Linear)] == [
        (13, 12),
        (7, 13),
        (3, 7),
    ]
    assert all(type(m) in (nn.Linear, type(act), nn.ReLU) for m in model)
    assert set(model.state_dict()) == set(mlp(act).state_dict())
    owned = [id(p) for group in opt.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    for parameter in model.parameters():
        for value in opt.state[parameter].values():
            assert (
                not isinstance(value, torch.Tensor)
                or value.dim() == 0
                or value.shape == parameter.shape
            )
    assert all(any(p is q for q in model.parameters()) for p in opt.state)
    train(model, opt, None, (12,), 3, 10)
    program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("layer", ["0", "1"])
@pytest.mark.parametrize("padding", [0, 1])
def test_channels(layer: str, padding: int) -> None:
    """A gate behind the BatchNorm is removable always; one before leaves BatchNorm's constant,
    which borders notice.
    """
    model = convnet(padding)
    model(torch.randn(4, 2, 9, 9))
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = Differentiable(model, opt, units=layer, seed=1)
    train(model, opt, method, (2, 9, 9), 4)
    off(method, 0, [1, 3])
    model.eval()
    x = torch.randn(5, 2, 9, 9)
    before = model(x)
    method.finalize()
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    constant = model[1].bias.detach()
    if layer == "1" or padding == 0:
        assert model[0].out_channels == model[4].in_channels == model[1].num_features == 6
    else:
        assert model[0].out_channels in (6, 7, 8)
        assert constant.numel() == model[0].out_channels
    train(model.train(), opt, None, (2, 9, 9), 2)


def test_branches_of_a_sequential_leave_its_function_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6)),
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)),
    )
    x = torch.randn(7, 5)
    before = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = Differentiable(model, optimizer, branches="*", initial=1e-6, seed=1)
    gated = model(x)
    assert gated.shape == before.shape
    torch.testing.assert_close(gated, before, rtol=1e-4, atol=1e-4)
    assert method.finalize()(x).shape == before.shape


def test_branches_become_absent() -> None:
    model = Residual()
    opt = OPTIMIZERS["adam"](model.parameters())
    method = Differentiable(model, opt, branches="bodies.*", units="bodies.*.0", seed=1)
    train(model, opt, method, (12,), 3)
    branches = next(i for i, t in enumerate(method.targets) if t.name == "branches")
    assert method.targets[branches].names == ["bodies.0", "bodies.1", "bodies.2"]
    off(method, branches, [1])
    off(method, 0, [4])
    off(method, 1, [4])
    x = torch.randn(9, 12)
    before = model(x)
    method.finalize()
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-5)
    assert isinstance(model.bodies[1], Absent)
    assert model.bodies[0][0].out_features == 7
    assert (
        len(list(model.parameters()))
        == 4 + 8
        == sum(len(g["params"]) for g in opt.param_groups)
        == len(opt.state)
    )
    train(model, opt, None, (12,), 2)


@pytest.mark.parametrize("kind", ["non-competitive", "exclusive"])
def test_weights_become_sparse_layers(kind: Any) -> None:
    model = mlp()
    opt = OPTIMIZERS["adam"](model.parameters())
    method = Differentiable(
        model, opt, weights=["0", "2"], weight_gate=kind, strength=0.0, initial=0.8, seed=1
    )
    train(model, opt, method, (12,), 3)
    x = torch.randn(9, 12)
    before = model(x)
    on = {t.name: int((t.values() != 0).sum()) for t in method.targets}
    method.finalize()
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-5)
    assert isinstance(model[0], SparseLinear)
    assert isinstance(model[2], SparseLinear)
    assert type(model[4]) is nn.Linear
    assert {"0": model[0].weight.connections, "2": model[2].weight.connections} == on
    assert on["0"] < 12 * 16
    if kind == "exclusive":
        assert bool((model[0].weight.fan_in() > 0).all())
    train(model, opt, None, (12,), 2)


def test_heads() -> None:
    model = Attention()
    opt = OPTIMIZERS["momentum"](model.parameters())
    method = Differentiable(model, opt, heads="*", seed=1)
    train(model, opt, method, (24,), 3)
    off(method, 0, [0, 2])
    x = torch.randn(5, 24)
    before = model(x)
    method.finalize()
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-5)
    assert isinstance(model.attention, rewire.nn.SparseMultiheadAttention)
    assert sum(w.connections for _, w in rewire.sparse_weights(model)) == 4 * 4 * 8
    train(model, opt, None, (24,), 2)


@pytest.mark.parametrize(
    ("gate", "strength"), [("non-competitive", 0.02), ("competitive", 0.02), ("group", 0.05)]
)
def test_training_switches_units_off(gate: Any, strength: float) -> None:
    """Only 2 of 12 inputs matter: a strong penalty leaves few units, and the task is still
    learned.
    """
    model = mlp()
    opt = torch.optim.Adam(model.parameters(), lr=0.02)
    method = Differentiable(
        model, opt, units="0", gate=gate, strength=strength, initial=0.5, seed=1
    )
    torch.manual_seed(3)
    x = torch.randn(256, 12)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    for _ in range(400):
        loss = nn.functional.cross_entropy(model(x), y) + method.penalty()
        opt.zero_grad()
        loss.backward()
        opt.step()
        method.step()
    before = model(x)
    method.finalize()
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)
    assert model[0].out_features <= 10
    assert float((model(x).argmax(1) == y).float().mean()) > 0.9


def test_resumes_bit_exactly() -> None:
    def run() -> tuple[Any, Any, Any]:
        model = mlp()
        opt = OPTIMIZERS["adam"](model.parameters())
        return model, opt, Differentiable(model, opt, strength=0.01, seed=1)

    model, opt, method = run()
    train(model, opt, method, (12,), 4)
    saved = copy.deepcopy([model.state_dict(), opt.state_dict(), method.state_dict()])
    train(model, opt, method, (12,), 4, 4)
    other, opt2, method2 = run()
    train(other, opt2, method2, (12,), 1, 70)
    other.load_state_dict(saved[0])
    opt2.load_state_dict(saved[1])
    method2.load_state_dict(saved[2])
    train(other, opt2, method2, (12,), 4, 4)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_group_shared_by_a_skip_connection_goes_only_where_all_of_it_is_off() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.a, self.b, self.c = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.a(x))
            return self.c(h + torch.relu(self.b(h)))

    model = Skip()
    opt = OPTIMIZERS["adam"](model.parameters())
    method = Differentiable(model, opt, units=["a", "b"], seed=1)
    train(model, opt, method, (12,), 2)
    off(method, 0, [1, 2])
    off(method, 1, [2, 3])
    x = torch.randn(7, 12)
    before = model(x)
    method.finalize()
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-5)
    assert model.a.out_features == model.b.out_features == model.b.in_features == 5


def test_scheduler_made_before_the_method_still_works() -> None:
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t)
    method = Differentiable(model, opt, seed=1)
    train(model, opt, method, (12,), 1)
    scheduler.step()
    assert [g["lr"] for g in opt.param_groups] == [0.05]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0}, "p must be a finite number above 0 and at most 2"),
        ({"p": 1.0, "gate": "competitive"}, "p must be below 1"),
        ({"p": 1.0, "normalise": True}, "p must be below 1"),
        ({"initial": 1.0}, "initial must be a finite number above 0 and below 1"),
        ({"strength": -1.0}, "strength must be"),
        ({"gate": "none"}, "gate must be"),
        ({"weight_gate": "x"}, "weight_gate must be"),
        ({"recover": "x"}, "recover must be"),
        ({"units": "nothing*"}, "matches no module"),
        ({"units": "1"}, "1 is a ReLU: allowed are Linear"),
        ({"heads": "0"}, "only MultiheadAttention has heads"),
        ({"branches": "1"}, "does not end in a Linear"),
        ({"units": "0", "weights": "0"}, "gates on units and on weights"),
        ({"heads": "0", "gate": "group"}, "gate='group' is for units"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    keys, owned = set(model.state_dict()), len(opt.param_groups[0]["params"])
    with pytest.raises(ValueError, match=message):
        Differentiable(model, opt, **options)
    assert set(model.state_dict()) == keys
    assert len(opt.param_groups[0]["params"]) == owned


def test_weight_decay_of_thresholds_is_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="weight decay"):
        Differentiable(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4))
    opt = torch.optim.SGD(rewire.param_groups(model, 1e-4), lr=0.1)
    method = Differentiable(model, opt, seed=1)
    assert [len(g["params"]) for g in opt.param_groups if not g["weight_decay"]] == [3 + 4]
    assert len(method.targets) == 2


@pytest.mark.parametrize("kind", ["units", "weights", "branches"])
def test_layers_that_share_a_weight_are_refused_by_name_or_left_alone(kind: Any) -> None:
    """Baking a gate into one of them would scale the other as well."""
    model = nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2)
    )
    model[2].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match=r"0 shares its weight with 2\.weight: untie"):
        Differentiable(model, optimizer, **{kind: ["0", "4"]})
    with pytest.raises(ValueError, match=r"2 shares its weight with 0\.weight: untie"):
        Differentiable(model, optimizer, **{kind: "2"})
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    if kind == "units":
        assert [target.name for target in Differentiable(model, optimizer).targets] == ["4"]
    if kind != "branches":
        assert [t.name for t in Differentiable(model, optimizer, **{kind: "*"}).targets][:1] == [
            "4"
        ]

"""Sparse ternary networks: what the forward pass uses, what the gradients are, the stages, and the
plain sparse end.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rewire import schedules
from rewire.methods import Ternary
from rewire.methods.dense_start.quantize import quantize, threshold_slope
from rewire.nn import SparseLinear, sparse_weights
from rewire.nn.convert.cut import dense_weights


class Sequence(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 4)
        y = self.body(x, x, x)[0] if "ttention" in type(self.body).__name__ else self.body(x)[0]
        out: Tensor = self.head(torch.cat([y, y], -1)[..., :8].sum(1))
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 6)),
        nn.Conv1d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 6),
    ),
    "gru": lambda: Sequence(nn.GRU(4, 4, num_layers=2, batch_first=True)),
    "lstm": lambda: Sequence(nn.LSTM(4, 10, proj_size=8, batch_first=True)),
    "attention": lambda: Sequence(nn.MultiheadAttention(4, 2, batch_first=True)),
    "attention-kdim": lambda: Sequence(
        nn.MultiheadAttention(4, 2, batch_first=True, kdim=4, vdim=4)
    ),
}


def made(name: str = "linear", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]().double()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, method: Ternary, time: int) -> None:
    generator = torch.Generator().manual_seed(time)
    x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 6, (8,), generator=generator)
    optimizer.zero_grad()
    (nn.functional.cross_entropy(model(x), y) + method.penalty()).backward()
    optimizer.step()
    method.step()


def by_hand(w: Tensor, threshold: float) -> Tensor:
    """Weight by weight, in Python."""
    flat = w.detach().flatten().tolist()
    top = max(abs(v) for v in flat)
    kept = [abs(v) for v in flat if abs(v) > threshold * top]
    scale = sum(kept) / len(kept)
    out = [(scale if v > 0 else -scale) if abs(v) > threshold * top else 0.0 for v in flat]
    return torch.tensor(out, dtype=w.dtype).view(w.shape)


X = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_forward_uses_ternary_weights_and_leaves_the_parameters(name: str, training: bool) -> None:
    model = made(name).train(training)
    before = dict(model.named_parameters())
    method = Ternary(model, sgd(model), threshold=0.4)
    quantized = {n: by_hand(w, 0.4) for n, _, _, w in dense_weights(model)}
    twin = copy.deepcopy(made(name)).train(training)
    with torch.no_grad():
        for n, _, _, w in dense_weights(twin):
            w.copy_(quantized[n])
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(model(X), twin(X))
        torch.testing.assert_close(copy.deepcopy(model)(X), twin(X))  # a copy has the hooks too
    assert all(p is before[n] for n, p in model.named_parameters())
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert method.count_connections() == {n: int((q != 0).sum()) for n, q in quantized.items()}
    assert all(torch.equal(m, quantized[n] != 0) for n, m in method.masks().items())
    with pytest.raises(RuntimeError):
        model(X[:, :5])
    assert all(p is before[n] for n, p in model.named_parameters()), "also after an error"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_go_straight_through(name: str, frozen: bool) -> None:
    model = made(name)
    with torch.no_grad():
        next(iter(dense_weights(model)))[3].mul_(4)  # some beyond the clip
    method = Ternary(model, sgd(model), threshold=0.4, clip=0.9, after_epochs=1, density=1.0)
    if frozen:
        method.freeze()
    masks = method.masks()
    twin = made(name)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for _, _, _, w in dense_weights(twin):
            w.copy_(by_hand(w, 0.4))
    for m in (model, twin):
        m(X).square().sum().backward()
    expected = {w.name: w.gradient for w in Ternary(twin, sgd(twin)).weights}
    clipped = 0
    for weight in method.weights:
        passes = weight.tensor.abs() <= 0.9
        clipped += int((~passes).sum())
        wanted = expected[weight.name] * (passes & masks[weight.name] if frozen else passes)
        torch.testing.assert_close(weight.gradient, wanted)
    assert clipped


def test_the_thresholds_slope_is_that_of_the_smoothed_quantizer() -> None:
    generator = torch.Generator().manual_seed(1)
    w, g = (torch.randn(30, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    threshold = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    scale = float(w.abs()[w.abs() > 0.8].mean())
    smooth = scale * w.sign() * ((w.abs() - threshold + 0.4) / 0.8).clamp(0, 1)
    (smooth * g).sum().backward()
    assert threshold.grad is not None
    kept = int((w.abs() > 0.8).sum())
    slope = float(threshold.grad)
    assert threshold_slope(w, g, 0.8, scaled=True) == (pytest.approx(slope, rel=1e-9), kept)
    assert threshold_slope(w, g, 0.8, scaled=False) == (
        pytest.approx(slope / scale, rel=1e-9),
        kept,
    )
    assert threshold_slope(w, g, 0.0, scaled=True) == (0.0, 600)


def test_signs_of_zeros_and_empty_masks() -> None:
    w = torch.tensor([0.0, -0.0, 0.5])
    kept = quantize(w, torch.ones(3, dtype=torch.bool), scaled=False, clip=1.0, frozen=True)
    assert kept.tolist() == [1.0, -1.0, 1.0]
    nothing = quantize(w, torch.zeros(3, dtype=torch.bool), scaled=True, clip=1.0, frozen=True)
    assert nothing.tolist() == [0.0, 0.0, 0.0]


def test_thresholds_are_pushed_up_to_the_density_and_then_frozen() -> None:
    model = made()
    optimizer = sgd(model)
    method = Ternary(model, optimizer, push=0.05, density=0.3, l2=1e-3)
    shares = [method.survivors()]
    for time in range(60):
        step(model, optimizer, method, time)
        shares.append(method.survivors())
        if time % 10 == 9:
            method.end_epoch()
            # A share is what the step's forward pass used, so the last one is not known to the
            # method yet.
            assert method.stage == (3 if min(shares[:-1]) <= 0.3 else 1)
            if method.stage == 1:
                assert shares[-1] < shares[-10]
    assert shares[0] > 0.8
    assert method.stage == 3
    assert 0.15 < min(shares) <= 0.3, "the push stops there"
    assert len(set(shares[-10:])) == 1, "the mask is frozen"
    assert float(method.penalty().detach()) == 0.0
    frozen, thresholds = method.masks(), method.thresholds()
    signs = {w.name: w.tensor.detach().clone() for w in method.weights}
    for time in range(60, 80):
        step(model, optimizer, method, time)
    assert method.thresholds() == thresholds
    for weight in method.weights:
        assert torch.equal(method.masks()[weight.name], frozen[weight.name])
        assert not torch.equal(
            weight.tensor[frozen[weight.name]], signs[weight.name][frozen[weight.name]]
        )
    assert method.stats()["stage"] == 3


def test_fixed_thresholds_stay_and_the_number_of_epochs_decides() -> None:
    model = made()
    optimizer = sgd(model)
    method = Ternary(model, optimizer, threshold=0.3, trainable=False, after_epochs=2)
    for time in range(6):
        step(model, optimizer, method, time)
        if time % 2:
            method.end_epoch()
        assert method.stage == (1 if time < 3 else 3)
    assert set(method.thresholds().values()) == {0.3}


def test_the_l2_term_and_the_gradient_that_moves_thresholds() -> None:
    """L2 is sum of squares; it takes no part in the thresholds' slope, and neither does the size of
    the loss scale.
    """
    runs = []
    for l2 in (0.0, 0.1):
        model = made()
        method = Ternary(
            model, torch.optim.SGD(model.parameters(), lr=0.1), l2=l2, push=0.0, threshold=0.2
        )
        expected = l2 * sum(float(w.tensor.detach().square().sum()) for w in method.weights)
        assert float(method.penalty().detach()) == pytest.approx(expected)
        optimizer = method.optimizers[0]
        (model(X).square().sum() + method.penalty()).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-12  # the weights stay where they are, for the comparison
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        method.step()
        runs.append(method.thresholds())
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)
    assert all(t != 0.2 for t in runs[0].values())


def test_stage_2_cuts_to_the_density_in_multiples_of_the_thresholds() -> None:
    model = made()
    method = Ternary(model, sgd(model), threshold=0.1, density=0.25)
    method._thresholds = [0.1, 0.3]
    tensors = [w.tensor.detach() for w in method.weights]
    ratios = [w.abs() / (t * w.abs().max()) for w, t in zip(tensors, (0.1, 0.3), strict=True)]
    every = torch.cat([r.flatten() for r in ratios]).sort(descending=True).values
    assert int((every > 1).sum()) > 72
    method.freeze()
    for mask, ratio in zip(method.masks().values(), ratios, strict=True):
        assert torch.equal(mask, ratio >= every[71])
    assert method.survivors() == 0.25
    late = made()
    optimizer = sgd(late)
    last = Ternary(late, optimizer, density=0.25, push=0.0)
    step(late, optimizer, last, 0)
    last.end_epoch()
    assert last.stage == 1
    last.end_epoch(last=True)
    assert (last.stage, last.survivors()) == (3, 0.25)
    other = made()
    kept = Ternary(other, sgd(other), threshold=0.1, density=0.25, trainable=False, after_epochs=1)
    before = kept.count_connections()
    kept.freeze()
    assert kept.count_connections() == before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", ["mean", "one"])
@pytest.mark.parametrize("prune", [1, 9])
def test_the_end_is_plain_sparse_and_trains_on(name: str, scale: Any, prune: int) -> None:
    model = made(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = Ternary(
        model,
        optimizer,
        threshold=0.4,
        scale=scale,
        after_epochs=prune,
        density=1.0 if prune == 1 else 0.05,
    )
    for time in range(6):
        step(model, optimizer, method, time)
        if time % 3 == 2:
            method.end_epoch()
    model.eval()
    before = model(X).detach()
    masks = method.masks()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert method.finalize() is model
    assert any(
        "made no "
        # stage 2 was not reached
        "update" in str(w.message)
        for w in caught
    ) == (prune == 9)
    assert method.finalize() is model
    torch.testing.assert_close(model(X), before, rtol=1e-9, atol=1e-9)
    pools = dict(sparse_weights(model))
    assert pools.keys() == masks.keys()
    for n, pool in pools.items():
        assert torch.equal(pool.to_dense() != 0, masks[n])
        assert pool.values.abs().unique().numel() == 1
        assert scale == "mean" or float(pool.values.detach()[0].abs()) == 1.0
        assert optimizer.state[pool.values]["exp_avg"].shape == pool.values.shape
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    model(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(X), before)


def test_encoders_do_not_go_past_the_hooks_in_eval() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1)
    twin = copy.deepcopy(model)
    method = Ternary(model, sgd(model), threshold=0.3)
    with torch.no_grad():
        for _, _, _, w in dense_weights(twin):
            w.copy_(by_hand(w, 0.3))
    x = torch.randn(2, 5, 8)
    for m in (model, twin):
        m.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)
    assert method.stage == 1


def test_an_abandoned_or_replaced_method_leaves_the_dense_network() -> None:
    model = made()
    optimizer = sgd(model)
    dense = functional_call(model, dict(model.named_parameters()), (X,))
    first = Ternary(model, optimizer, threshold=0.4)
    assert not torch.equal(model(X), dense)
    second = Ternary(model, optimizer, threshold=0.0)
    del first
    assert not torch.equal(model(X), dense)
    del second
    assert torch.equal(model(X), dense)


@pytest.mark.parametrize("stop", [3, 9])
def test_resume_is_bit_exact(stop: int) -> None:
    def begin(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Ternary]:
        model = made(seed=seed)
        optimizer = sgd(model)
        return (
            model,
            optimizer,
            Ternary(
                model, optimizer, push=schedules.Linear(0.1, 0.05, 4), after_epochs=2, seed=seed
            ),
        )

    def go(run: tuple[nn.Module, torch.optim.Optimizer, Ternary], times: range) -> None:
        for time in times:
            step(*run, time)
            if time % 3 == 2:
                run[2].end_epoch()

    whole, first, second = begin(0), begin(0), begin(5)
    go(whole, range(14))
    go(first, range(stop))
    saved = copy.deepcopy([part.state_dict() for part in first])
    assert saved[2]["own"]["stage"] == (1 if stop == 3 else 3)
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    go(second, range(stop, 14))
    assert whole[2].stats() == second[2].stats()
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in ((r[0](X) for r in pair) for pair in [(whole, second)]):
        assert torch.equal(a, b)
    own = saved[2]["own"]
    for damage in (
        {"stage": 2},
        {"thresholds": [0.1]},
        {"stage": 3, "masks": [torch.ones(2, 2).bool()] * 2},
    ):
        with pytest.raises(ValueError, match=r"damaged|other shapes"):
            second[2].load_state_dict(saved[2] | {"own": own | damage})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": 1.0}, "threshold must be"),
        ({"threshold": -0.1}, "threshold must be"),
        ({"push": -1.0}, "push must be"),
        ({"l2": float("inf")}, "l2 must be"),
        ({"density": 0.0}, "density must be"),
        ({"density": 1e-3}, "leaves a weight of 288 potential connections without any"),
        ({"after_epochs": 0}, "after_epochs must be"),
        ({"after_epochs": "soon"}, "after_epochs must be"),
        ({"after_epochs": True}, "after_epochs must be"),
        ({"trainable": False}, "give a number of epochs"),
        ({"scale": "max"}, "scale must be"),
        ({"clip": 0.0}, "clip must be"),
        ({"threshold_lr": -1.0}, "threshold_lr must be"),
        ({"exclude": 1}, "exclude must be a glob"),
        ({"exclude": "*"}, "no dense weight to act on"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], message: str) -> None:
    model = made()
    with pytest.raises(ValueError, match=message):
        Ternary(model, sgd(model), **given)


def test_scope() -> None:
    model = made()
    optimizer = sgd(model)
    method = Ternary(model, optimizer, only="0")
    step(model, optimizer, method, 0)
    method.end_epoch(last=True)
    method.finalize()
    assert isinstance(model[0], SparseLinear)  # type: ignore[index]
    assert type(model[2]) is nn.Linear  # type: ignore[index]


# torch's compiler calls what torch deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_use_the_quantized_weights_of_the_moment() -> None:
    model = made()
    optimizer = sgd(model)
    method = Ternary(model, optimizer, threshold=0.4)
    compiled = torch.compile(model, backend="eager")
    for time in range(3):
        torch.testing.assert_close(compiled(X), model(X))
        step(model, optimizer, method, time)
    method.freeze()
    torch.testing.assert_close(compiled(X), model(X))

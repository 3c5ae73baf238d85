"""Top-KAST against a dense simulation with masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewire import methods
from rewire.nn import SparseLinear, SparseWeight, sparse_weights

LR, L2, EVERY = 0.2, 0.01, 3


def model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    g = torch.Generator().manual_seed(0)
    return nn.Sequential(
        SparseLinear(10, 14, False, connections=30, generator=g, dtype=dtype),
        nn.Tanh(),
        SparseLinear(14, 4, False, connections=20, generator=g, dtype=dtype),
    )


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return torch.randn(16, 10, generator=g, dtype=dtype), torch.randint(0, 4, (16,), generator=g)


def top(theta: Tensor, k: int) -> Tensor:
    mask = torch.zeros(theta.numel(), dtype=torch.bool)
    mask[theta.abs().flatten().sort(descending=True, stable=True).indices[:k]] = True
    return mask.view_as(theta)


def theta_of(method: methods.TopKAST, number: int, weight: SparseWeight) -> Tensor:
    """theta of all positions, put together from where it is kept."""
    theta = method._theta[number].clone()
    theta[method._exploring[number].at] = method._exploring[number].values.detach()
    rows, cols, values = weight.coo()
    theta[rows * weight.matrix_shape[1] + cols] = values.detach()
    return theta.view(weight.matrix_shape)


@pytest.mark.parametrize("explore", [0.0, 0.5, 1.0, 100.0])
def test_it_is_the_dense_algorithm_with_masks(explore: float) -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), LR)
    method = methods.TopKAST(net, optimizer, explore=explore, l2=L2, every=EVERY)
    weights = [w for _, w in sparse_weights(net)]
    thetas = [theta_of(method, i, w) for i, w in enumerate(weights)]
    in_a = [w.to_dense().detach() != 0 for w in weights]
    in_b = [a.clone() for a in in_a]  # nothing explores before the first choice
    for step in range(1, 11):
        x, y = batch(step)
        # The dense simulation: forward with A, the gradient of all that A might be, B moves.
        alphas = [(t * a).requires_grad_() for t, a in zip(thetas, in_a, strict=True)]
        loss = nn.functional.cross_entropy(torch.tanh(x @ alphas[0].T) @ alphas[1].T, y)
        loss.backward()
        for i, w in enumerate(weights):
            density = w.connections / w.size
            moved = thetas[i] - LR * alphas[i].grad * in_b[i]
            exploring = torch.where(
                in_b[i], torch.tensor(LR * L2 / density, dtype=torch.float64), 0.0
            )
            shrink = torch.where(in_a[i], torch.tensor(LR * L2, dtype=torch.float64), exploring)
            thetas[i] = moved * (1 - shrink)
            if step == 1 or step % EVERY == 0:
                in_a[i] = top(thetas[i], w.connections)
                in_b[i] = top(thetas[i], w.connections + round(explore * w.connections))
        # The method.
        mine = nn.functional.cross_entropy(net(x), y) + method.penalty()
        torch.testing.assert_close(mine, loss)
        optimizer.zero_grad()
        mine.backward()
        optimizer.step()
        method.step()
        for i, w in enumerate(weights):
            assert torch.equal(w.to_dense().detach() != 0, in_a[i])
            torch.testing.assert_close(theta_of(method, i, w), thetas[i])
    assert explore == 0.0 or sum(method.stats()["grown"].values()) > 20


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exploring_connections_are_trained_as_the_optimizer_would(name: str) -> None:
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    method = methods.TopKAST(net, optimizer, l2=0.0, every=100)
    weight = net[0].weight
    twin = other = None
    for step in range(1, 6):
        x, y = batch(step)
        # the sets were chosen after the first step: follow all of B densely, as one parameter
        if step == 2:
            at = method._exploring[0].at
            twin = nn.Parameter(method._exploring[0].values.detach().clone())
            other = OPTIMIZERS[name]([twin])
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        if twin is not None and other is not None:
            dense = [w.to_dense().detach().requires_grad_() for _, w in sparse_weights(net)]
            nn.functional.cross_entropy(torch.tanh(x @ dense[0].T) @ dense[1].T, y).backward()
            assert dense[0].grad is not None
            twin.grad = dense[0].grad.flatten()[at]
            other.step()
        optimizer.step()
        method.step()
        if twin is not None:
            torch.testing.assert_close(method._exploring[0].values, twin)
    assert weight.connections == 30


def test_micro_batches_clipping_and_loss_scale() -> None:
    """Whatever scales the optimizer's gradients scales those of what explores."""
    results = []
    for way in ("plain", "micro", "scaled"):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), 0.2)
        method = methods.TopKAST(net, optimizer, every=2, seed=1)
        for step in range(1, 6):
            x, y = batch(step)
            optimizer.zero_grad()
            if way == "micro":
                for part in range(4):
                    own = slice(part * 4, part * 4 + 4)
                    (nn.functional.cross_entropy(net(x[own]), y[own]) / 4).backward()
            else:
                (
                    nn.functional.cross_entropy(net(x), y) * (1024 if way == "scaled" else 1)
                ).backward()
            if way == "scaled":  # what GradScaler.unscale_ does
                for p in net.parameters():
                    p.grad /= 1024
            optimizer.step()
            method.step()
        results.append([theta_of(method, i, w) for i, (_, w) in enumerate(sparse_weights(net))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_it_stops_exploring() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.2)
    method = methods.TopKAST(net, optimizer, every=1, until=3)
    for step in range(1, 7):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        method.step()
        if step == 3:
            before = [w.fingerprint() for _, w in sparse_weights(net)]
            assert net[0].weight.capture is None
    assert [w.fingerprint() for _, w in sparse_weights(net)] == before
    assert method.updates == 3


def test_what_was_not_captured_is_said() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.2)
    method = methods.TopKAST(net, optimizer)
    x, y = batch(0)
    for step in range(2):
        optimizer.zero_grad()
        if step:  # put there by hand
            loss = nn.functional.cross_entropy(net(x), y)
            for p, gradient in zip(
                net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
            ):
                p.grad = gradient
        else:
            nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        if step:
            with pytest.raises(RuntimeError, match="not captured"):
                method.step()
        else:
            method.step()


@pytest.mark.parametrize("bad", [{"explore": -1.0}, {"l2": -1.0}, {"every": 0}, {"until": -1}])
def test_bad_hyper_parameters_are_refused(bad: dict[str, float]) -> None:
    net = model()
    with pytest.raises(ValueError, match=next(iter(bad))):
        methods.TopKAST(net, torch.optim.SGD(net.parameters(), 0.1), **bad)

"""Gates that are exactly zero: the facts of methods that rest on them, against brute force and
autograd.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rewire.methods.differentiable.gates import (
    Elementwise,
    Gate,
    competitive,
    exclusive,
    group,
    non_competitive,
    p_norm,
)

numbers = st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=9).map(
    lambda x: torch.tensor(x, dtype=torch.float64)
)
betas = st.floats(-6, 0.5).map(lambda b: torch.tensor(b, dtype=torch.float64))


def sigmoid(b: torch.Tensor) -> float:
    return 1 / (1 + math.exp(-float(b.detach())))


@settings(deadline=None)
@given(numbers, betas)
def test_non_competitive_is_its_formula(alpha, beta):
    total = sum(abs(a) for a in alpha.tolist())
    expected = [math.copysign(max(abs(a) - sigmoid(beta) * total, 0.0), a) for a in alpha.tolist()]
    torch.testing.assert_close(
        non_competitive(alpha, beta).abs(), torch.tensor(expected, dtype=torch.float64).abs()
    )
    signs = torch.sign(non_competitive(alpha, beta))
    assert bool(((signs == 0) | (signs == torch.sign(alpha))).all())


@settings(deadline=None)
@given(numbers, betas, st.floats(0.01, 100))
def test_zeros_do_not_change_with_scale_and_are_bounded(alpha, beta, c):
    """The zero set belongs to the direction of alpha; fewer than 1 / sigma(beta) entries
    survive.
    """
    near = ((alpha.abs() - torch.sigmoid(beta) * alpha.abs().sum()).abs() < 1e-9).any()
    if not near:  # on the threshold itself rounding decides
        assert torch.equal(non_competitive(alpha, beta) == 0, non_competitive(c * alpha, beta) == 0)
    assert int((non_competitive(alpha, beta) != 0).sum()) < 1 / sigmoid(beta)
    assert int((non_competitive(alpha, beta, keep_one=True) != 0).sum()) >= min(
        1, int(alpha.abs().max() > 1e-300)
    )
    rows = alpha.unsqueeze(1).expand(-1, 3)
    if not near and alpha.abs().min() > 1e-3:
        assert torch.equal(group(rows, beta) == 0, group(c * rows, beta) == 0)


@settings(deadline=None)
@given(numbers, betas)
def test_competitive_sums_to_one_and_keeps_its_largest(alpha, beta):
    a = competitive(alpha, beta)
    assert float(a.sum()) == pytest.approx(1)
    assert bool((a >= 0).all())
    assert float(a[alpha.argmax()]) > 0
    torch.testing.assert_close(competitive(alpha + 5, beta), a)  # exp(alpha) up to a factor
    gamma = torch.exp(alpha)
    cut = (gamma - torch.sigmoid(beta) * gamma.sum()).clamp(min=0)
    if float(cut.max()) > 2e-3 * float(gamma.max()):  # the guard of the largest does not bite
        torch.testing.assert_close(a, cut / cut.sum())


@pytest.mark.parametrize("n", [1, 2, 7, 512])
def test_equal_components_all_live_below_one_over_n_and_all_die_above(n):
    alpha = torch.ones(n, dtype=torch.float64)
    below, above = (
        torch.tensor(math.log(s / (1 - s)), dtype=torch.float64) for s in (0.9 / (n + 1), 1 - 1e-9)
    )
    assert bool((non_competitive(alpha, below) != 0).all())
    assert not non_competitive(alpha, torch.maximum(above, below + 40)).any()
    gate = Gate(n)
    torch.testing.assert_close(gate(), torch.ones(n))  # a start that changes nothing
    torch.testing.assert_close(Gate(n, "competitive")(), torch.full((n,), 1 / n))


@pytest.mark.parametrize("function", [non_competitive, competitive])
def test_gradients_away_from_kinks(function):
    alpha = torch.tensor([0.9, -0.7, 0.05, 0.4], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: function(a, b, "none"), (alpha, beta))
    a = function(alpha, beta, "none")
    assert int((a == 0).sum()) == 1  # of one that is off the gradient is 0 as well


@pytest.mark.parametrize("function", [group, exclusive])
def test_gradients_of_groups(function):
    weight = torch.randn(
        4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    beta = torch.tensor(
        -2.5 if function is group else [-2.5] * 4, dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(lambda w, b: function(w, b, "none"), (weight, beta))


def test_closed_form_gradient():
    """d a_i / d alpha_k = delta_ik - sigma(beta) sign_i sign_k for what is on, 0 for what is
    off.
    """
    alpha = torch.tensor([0.9, -0.7, 0.01, 0.4], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda x: non_competitive(x, beta, "none"), alpha)
    sign, s = torch.sign(alpha.detach()), sigmoid(beta)
    on = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        jacobian, on[:, None] * (torch.eye(4) - s * sign[:, None] * sign[None, :])
    )
    slope = torch.autograd.functional.jacobian(lambda b: non_competitive(alpha, b, "none"), beta)
    torch.testing.assert_close(slope, -on * sign * s * (1 - s) * alpha.detach().abs().sum())


def test_elu_recovers_what_is_off():
    alpha = torch.tensor([0.9, 0.01], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(-1.0, dtype=torch.float64)
    for recover, learns in (("none", False), ("elu", True)):
        a = non_competitive(alpha, beta, recover)
        assert float(a[1].detach()) == 0
        (g,) = torch.autograd.grad(a[1], alpha)
        assert bool(g.any()) is learns
    z = 0.01 - torch.sigmoid(beta) * 0.91
    torch.testing.assert_close(g[1], torch.exp(z) * (1 - torch.sigmoid(beta)))


def test_exclusive_by_brute_force():
    weight = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    beta = torch.linspace(-3, -0.5, 5, dtype=torch.float64)
    out = exclusive(weight, beta)
    for row, b, got in zip(weight, beta, out, strict=True):
        alone = non_competitive(row, b, keep_one=True)
        torch.testing.assert_close(got, alone)
        assert got.any()


def test_p_norm():
    a = torch.tensor([0.0, 4.0, -1.0], dtype=torch.float64, requires_grad=True)
    for p, root, expected in ((0.5, True, 9), (0.5, False, 3), (1.0, True, 5)):
        assert float(p_norm(a.detach(), p, root)) == pytest.approx(expected)
    (g,) = torch.autograd.grad(p_norm(a, 0.5), a)
    assert bool(torch.isfinite(g).all())
    assert float(g[0]) == 0
    zero = torch.zeros(3, requires_grad=True)
    for p in (0.5, 1.0, 2.0):
        value = p_norm(zero, p)
        (g,) = torch.autograd.grad(value, zero)
        assert float(value.detach()) == 0
        assert bool(torch.isfinite(g).all())


@pytest.mark.parametrize("kind", ["non-competitive", "exclusive"])
def test_elementwise_starts_with_most_weights_on(kind):
    torch.manual_seed(0)
    layer = nn.Linear(50, 20)
    before = layer.weight.detach().clone()
    made = Elementwise(layer.weight, kind, initial=0.01, recover="elu")(layer.weight)
    assert float((made != 0).float().mean()) > 0.98
    torch.testing.assert_close(made, before, atol=2e-2, rtol=0)


def test_the_slope_of_the_p_norm_is_bounded():
    """However small an entry is, its slope is that at one hundredth of the largest; the value is
    continuous there.
    """
    for tiny in (1e-3, 1e-6, 1e-12):
        a = torch.tensor([1.0, tiny], dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(p_norm(a, 0.5, root=False), a)
        assert float(g[1]) == pytest.approx(10)
    edge = [
        p_norm(torch.tensor([1.0, x], dtype=torch.float64), 0.5, root=False)
        for x in (0.01 - 1e-9, 0.01 + 1e-9)
    ]
    assert float(edge[0]) == pytest.approx(float(edge[1]), abs=1e-6)

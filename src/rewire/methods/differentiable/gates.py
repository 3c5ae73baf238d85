"""Gates that learn to be exactly zero: the parameterisations of differentiable sparsification, and
the modules of them.

Source: Lee, Differentiable Sparsification for Deep Neural Networks (arXiv 1910.03201). Its body
could not be read; the formulas are those known from its abstract and from memory, the properties
below are derived from them and tested.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "BranchGate",
    "Elementwise",
    "Gate",
    "GateKind",
    "Recover",
    "competitive",
    "exclusive",
    "group",
    "non_competitive",
    "p_norm",
]

GateKind = Literal["competitive", "non-competitive", "group"]
Recover = Literal["none", "elu"]

#: What keeps the last component alive: its threshold stays this far below the largest.
MARGIN = 1e-3

#: Entries below this share of the largest count linearly in `p_norm`, so that its slope stays
#: bounded.
FLOOR = 1e-2


class _Rectify(torch.autograd.Function):
    """relu forward; backward the derivative of ELU (1 above 0, exp(z) below), so that what is zero
    still learns.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return g * torch.exp(z.clamp(max=0))


def _rectify(z: Tensor, recover: Recover) -> Tensor:
    y: Tensor = _Rectify.apply(z) if recover == "elu" else torch.relu(z)  # type: ignore[no-untyped-call]
    return y


def _threshold(size: Tensor, beta: Tensor, dim: int | None, keep_one: bool) -> Tensor:
    """sigma(beta) times the sum of ``size`` (over ``dim``, or all); with ``keep_one`` below the
    largest entry.
    """
    total = size.sum() if dim is None else size.sum(dim, keepdim=True)
    t = torch.sigmoid(beta) * total
    if keep_one:
        largest = size.max() if dim is None else size.amax(dim, keepdim=True)
        t = torch.minimum(t, (1 - MARGIN) * largest)
    return t


def competitive(alpha: Tensor, beta: Tensor, recover: Recover = "elu") -> Tensor:
    """A sparse stand-in for softmax, (n) -> (n), non-negative and summing to 1::

        gamma_i = exp(alpha_i); g_i = (gamma_i - sigma(beta) sum_j gamma_j)_+; a_i = g_i / sum_j g_j

    The largest component always survives (otherwise the sum would be 0).
    """
    gamma = torch.exp(alpha - alpha.max().detach())  # a common factor cancels
    kept = _rectify(gamma - _threshold(gamma, beta, None, keep_one=True), recover)
    return kept / kept.sum()


def non_competitive(
    alpha: Tensor, beta: Tensor, recover: Recover = "elu", keep_one: bool = False
) -> Tensor:
    """``a_i = sign(alpha_i) (|alpha_i| - sigma(beta) ||alpha||_1)_+``, any shape; the sign counts
    as constant.

    Which entries are zero does not change when alpha is scaled, and fewer than 1 / sigma(beta) are
    not.
    """
    size = alpha.abs()
    return torch.sign(alpha.detach()) * _rectify(
        size - _threshold(size, beta, None, keep_one), recover
    )


def group(weight: Tensor, beta: Tensor, recover: Recover = "elu", keep_one: bool = False) -> Tensor:
    """Factors (n) of the n groups (rows of ``weight``, all dimensions but the first) of a
    differentiable l_{2,1}::

    a_g = (||w_g||_2 - sigma(beta) sum_h ||w_h||_2)_+ / ||w_g||_2,   0 for a row of zeros
    """
    norm: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    kept = _rectify(norm - _threshold(norm, beta, None, keep_one), recover)
    return kept / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def exclusive(weight: Tensor, beta: Tensor, recover: Recover = "elu") -> Tensor:
    """Differentiable l_{1,2}: within each row g, ``sign(w_gi) (|w_gi| - sigma(beta_g)
    ||w_g||_1)_+``.

    weight: (n, ...), beta: (n); the entries of a row compete with one another, and no row dies (its
        largest survives).
    """
    flat = weight.flatten(1)
    size = flat.abs()
    kept = _rectify(size - _threshold(size, beta.unsqueeze(1), 1, keep_one=True), recover)
    return (torch.sign(flat.detach()) * kept).view_as(weight)


def p_norm(a: Tensor, p: float, root: bool = True) -> Tensor:
    """``sum |a_i|^p``, to the power 1/p if ``root``; a scalar, with gradient from the non-zero
    entries only.

    Where p < 1 the slope grows without bound towards 0, and one step of gradient descent would
    throw a small entry far beyond it: below `FLOOR` of the largest entry a straight line to 0 takes
    the power's place. 0, with zero gradient, if every entry is 0.
    """
    size = a.abs()
    alive = a != 0
    power = torch.where(alive, size, torch.ones_like(a)) ** p
    if p < 1 and a.numel():
        low = (FLOOR * size.detach().max()).clamp(min=torch.finfo(a.dtype).tiny)
        power = torch.where(size < low, size * low ** (p - 1), power)
    total = (power * alive).sum()
    if not root or p == 1:
        return total
    rooted: Tensor = total.clamp(min=torch.finfo(a.dtype).tiny) ** (1 / p)
    return torch.where(total > 0, rooted, total)


def logit(share: float) -> float:
    """The beta whose sigmoid is ``share``."""
    return math.log(share / (1 - share))


class Gate(nn.Module):
    """n learned factors, exactly 0 where a component is off.

    Attributes:
        alpha: (n) parameter; with kind "group" none, the layer's own weights decide.
        beta: scalar parameter, the learned relative threshold.

    Args:
        count: n, at least 1.
        initial: share c; beta starts at logit(c / n), so that all components are on (c < 1) and
            ``alpha`` where the function is unchanged: all factors 1 ("non-competitive") or 1 / n
            ("competitive").
        keep_one: the largest component cannot be switched off.
    """

    def __init__(
        self,
        count: int,
        kind: GateKind = "non-competitive",
        *,
        initial: float = 0.01,
        recover: Recover = "elu",
        keep_one: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.count, self.kind, self.recover, self.keep_one = count, kind, recover, keep_one
        # sigma(beta) = c / n; a single component is not its own competitor
        start = initial / max(count, 2)
        self.beta = nn.Parameter(torch.tensor(logit(start), device=device, dtype=dtype))
        if kind == "group":
            self.register_parameter("alpha", None)
        else:
            value = 0.0 if kind == "competitive" else 1 / (1 - start * count)
            self.alpha = nn.Parameter(torch.full((count,), value, device=device, dtype=dtype))

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """The factors, (n); ``weight`` (n, ...) is needed by kind "group" only."""
        if self.kind == "group":
            assert weight is not None
            return group(weight, self.beta, self.recover, self.keep_one)
        if self.kind == "competitive":
            return competitive(self.alpha, self.beta, self.recover)
        return non_competitive(self.alpha, self.beta, self.recover, self.keep_one)

    def extra_repr(self) -> str:
        return f"{self.count}, {self.kind!r}, recover={self.recover!r}"


class BranchGate(Gate):
    """A gate that stands beside branches: an `nn.Sequential` that runs it as one of its layers gets
    its input back.
    """

    def forward(self, x: Tensor | None = None) -> Tensor:
        """The factors, (n); ``x`` if it is given."""
        return super().forward() if x is None else x


class Elementwise(nn.Module):
    """A parametrization (`torch.nn.utils.parametrize`) under which single weights become exactly
    zero.

    kind "non-competitive": all entries share one threshold; "exclusive": the entries of each row
    have their own.
    """

    def __init__(
        self,
        weight: Tensor,
        kind: Literal["non-competitive", "exclusive"],
        *,
        initial: float,
        recover: Recover,
    ) -> None:
        super().__init__()
        self.kind, self.recover = kind, recover
        rows = weight.shape[0]
        group_size = weight.numel() if kind == "non-competitive" else weight.numel() // rows
        beta = torch.full(
            () if kind == "non-competitive" else (rows,), logit(initial / max(group_size, 2))
        )
        self.beta = nn.Parameter(beta.to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses, shaped as ``weight``."""
        if self.kind == "exclusive":
            return exclusive(weight, self.beta, self.recover)
        return non_competitive(weight, self.beta, self.recover, keep_one=True)

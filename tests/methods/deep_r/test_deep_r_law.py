"""DEEP R samples the law it claims: P(S) is the integral of exp(-(E + alpha sum theta) / T) over
the face of S.

The toy of Bellec et al. (arXiv 1711.05136), in the operational form that Algorithm 1 satisfies: M =
4 positions, K = 2, a quadratic energy in w = s theta. With ``scope="neuron"`` every row of one
layer is a chain of its own, so thousands of independent chains run as one layer; the optimizer
steps along the quadratic's gradient, written by hand.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate

from rewire import topology
from rewire.methods import DeepR
from rewire.methods.core.base import Purpose
from rewire.nn import SparseWeight

M, K = 4, 2
TEMPERATURE, ALPHA = 0.2, 0.1
SUPPORTS = list(itertools.combinations(range(M), K))
SIGNS = np.array([1.0, -1.0, 1.0, -1.0])
MU = np.array([1.0, -0.6, 0.3, 0.4])
_B = np.array(
    [[1.0, 0.3, -0.2, 0.1], [0.0, 0.9, 0.4, -0.3], [0.1, 0.0, 1.1, 0.2], [0.2, -0.1, 0.0, 0.8]]
)
A = _B @ _B.T + 0.1 * np.eye(M)


def quadrature() -> np.ndarray:
    """P(S) for every support by two-dimensional integration over the positive quadrant."""

    def density(second: float, first: float, support: tuple[int, int]) -> float:
        w = np.zeros(M)
        w[list(support)] = SIGNS[list(support)] * (first, second)
        energy = 0.5 * (w - MU) @ A @ (w - MU) + ALPHA * (first + second)
        return math.exp(-energy / TEMPERATURE)

    mass = [integrate.dblquad(density, 0, 6, 0, 6, args=(s,), epsabs=1e-6)[0] for s in SUPPORTS]
    return np.array(mass) / sum(mass)


class Chains:
    """``n`` independent chains as the rows of one n x 4 layer with fan-in 2."""

    def __init__(self, n: int, eta: float, seed: int, **parameters: Any) -> None:
        rows = torch.arange(n).repeat_interleave(K)
        cols = torch.cat([torch.tensor(SUPPORTS[i % len(SUPPORTS)]) for i in range(n)])
        signs = topology.position_signs(rows, cols, seed, Purpose.COUNT + Purpose.SIGN)
        start = 0.3 * signs.to(torch.float64)
        self.model = torch.nn.Sequential(SparseWeight.from_coo((n, M), rows, cols, start))
        self.weight = self.model[0]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=eta)
        self.method = DeepR(
            self.model,
            self.optimizer,
            l1=ALPHA,
            temperature=TEMPERATURE,
            scope="neuron",
            seed=seed,
            **parameters,
        )
        # Positions get their signs from a hash, so chains differ in them; turning each chain's
        # energy by (its signs x SIGNS) gives all of them the one law of SIGNS.
        rows, cols = torch.meshgrid(torch.arange(n), torch.arange(M), indexing="ij")
        stream = self.method.pools[0].stream(Purpose.SIGN)
        signs = topology.position_signs(rows.flatten(), cols.flatten(), seed, stream).view(n, M)
        self.turn = signs * torch.tensor(SIGNS)
        self.A, self.mu = torch.tensor(A), torch.tensor(MU)

    def step(self) -> None:
        rows, cols = self.weight.rows.long(), self.weight.cols.long()
        with torch.no_grad():
            dense = torch.zeros(self.weight.shape, dtype=torch.float64)
            dense[rows, cols] = self.weight.values
            gradient = self.turn * ((self.turn * dense - self.mu) @ self.A)
        self.weight.values.grad = gradient[rows, cols]
        self.optimizer.step()
        self.method.step()

    def occupation(self) -> np.ndarray:
        """Share of the chains on each support; what is missing from 1 has fewer than K active
        connections.
        """
        rows, cols = self.weight.rows.long(), self.weight.cols.long()
        active = torch.ones_like(rows, dtype=torch.bool)
        active[self.method._waiting[0]] = False
        code = torch.zeros(self.weight.shape[0], dtype=torch.long)
        code.index_add_(0, rows[active], 1 << cols[active])
        count = torch.bincount(code, minlength=1 << M).numpy() / len(code)
        return np.array([count[sum(1 << i for i in support)] for support in SUPPORTS])


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Between two laws on the supports; mass that either lacks lies elsewhere."""
    return 0.5 * float(np.abs(p - q).sum() + abs(p.sum() - q.sum()))


def test_support_distribution_matches_quadrature() -> None:
    chains = Chains(5_000, eta=3e-3, seed=11)
    for _ in range(6_667):  # 20 units of time
        chains.step()
    assert total_variation(chains.occupation(), quadrature()) < 0.02  # measured: 0.003


def test_rewiring_every_100_steps_breaks_the_law() -> None:
    chains = Chains(2_000, eta=3e-3, seed=12, every=100)
    for _ in range(1_000):
        chains.step()
    seen = []
    for _ in range(500):
        chains.step()
        seen.append(chains.occupation())
    occupied = np.mean(seen, axis=0)
    assert occupied.sum() < 0.5  # most of the time fewer than K connections are active
    assert total_variation(occupied, quadrature()) > 0.2


def test_rewirings_per_step_scale_with_the_root_of_eta() -> None:
    rates = []
    for eta in (4e-3, 1e-3):
        chains = Chains(1_500, eta=eta, seed=13)
        for _ in range(int(2 / eta)):
            chains.step()
        before = chains.method.stats()["dropped"]["0"]
        steps = int(2 / eta)
        for _ in range(steps):
            chains.step()
        rates.append((chains.method.stats()["dropped"]["0"] - before) / steps)
    assert rates[0] / rates[1] == pytest.approx(2.0, rel=0.15)

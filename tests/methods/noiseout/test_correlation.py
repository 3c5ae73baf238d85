"""Moments of units, which correlations and merges are computed from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rewire.methods.noiseout.correlation import measure
from rewire.nn.surgery import UnitGraph

pytest.importorskip("torch_pruning")

from dependent_units import dependent, method


def test_moments_are_those_of_numpy() -> None:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 5),
        nn.ReLU(),
        nn.Linear(5, 2),
    ).double()
    batches = list(torch.randn(30, 36, dtype=torch.float64).split(7))
    graph = UnitGraph(model, batches[0])
    found = measure(graph, ["1", "3", "6"], batches)
    x = torch.cat(batches)
    seen = {"1": model[:3](x), "3": model[:5](x), "6": model[:8](x)}
    for name, h in seen.items():
        flat = h.detach().movedim(1, 0).flatten(1).numpy()
        mean, covariance = flat.mean(1), np.cov(flat, bias=True)
        np.testing.assert_allclose(found[name]._means[0], mean, atol=1e-12)
        np.testing.assert_allclose(found[name]._second[0], covariance, atol=1e-12)
        rho = np.abs(np.corrcoef(flat))
        np.fill_diagonal(rho, -1)
        u, v = np.unravel_index(rho.argmax(), rho.shape)
        best = found[name].best("correlation")
        assert best is not None
        assert {best.unit, best.into} == {u, v}
        assert best.into is not None
        alpha, beta = np.polyfit(flat[best.into], flat[best.unit], 1)
        np.testing.assert_allclose(found[name].coefficients(best)[0], (alpha, beta), atol=1e-10)
        residual = np.mean((flat[best.unit] - alpha * flat[best.into] - beta) ** 2)
        columns = {
            "1": model[3].weight,
            "3": model[6].weight.view(5, 3, 9).transpose(1, 2),
            "6": model[8].weight,
        }[name]
        squares = columns.detach().square().movedim(-1 if name == "3" else 1, 0).flatten(1).sum(1)
        assert best.damage == pytest.approx(float(squares[best.unit]) * residual, rel=1e-9)
        assert best.damage <= float(squares[best.into]) * np.mean(
            (
                flat[best.into]
                - np.polyval(np.polyfit(flat[best.unit], flat[best.into], 1), flat[best.unit])
            )
            ** 2
        ) * (1 + 1e-9)


def test_between_merges_rows_are_deleted_and_nothing_else() -> None:
    """Incremental moments after exact merges are those measured anew."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    dependent(model[0], 1, 3, 2.0, 1.0)
    dependent(model[0], 4, 5, -1.0, 0.5)
    x = torch.randn(50, 4, dtype=torch.float64)
    made = method(model, x, only=["0", "1"])
    moments = made._measure(made._names)
    assert made._merge(moments)
    assert made._merge(moments)
    for name, fresh in made._measure(made._names).items():
        assert torch.equal(fresh.units, moments[name].units)
        torch.testing.assert_close(fresh._second[0], moments[name]._second[0], rtol=1e-9, atol=1e-9)

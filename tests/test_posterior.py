"""Averages over sampled networks: the scores against scikit-learn and by hand, the samples against
the model itself.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch import nn

import rewire
from rewire import posterior
from rewire.methods import DeepR, SoftDeepR
from rewire.nn import SparseLinear, sparse_weights
from rewire.posterior import Posterior


def probabilities(
    n: int = 500, classes: int = 4, sharp: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    p = torch.softmax(sharp * torch.randn(n, classes, generator=g, dtype=torch.float64), 1)
    return p, torch.randint(0, classes, (n,), generator=g)


# --- scores ---------------------------------------------------------------------------------------


def test_scores_equal_scikit_learn_and_a_loop() -> None:
    p, y = probabilities()
    assert posterior.negative_log_likelihood(p, y) == pytest.approx(
        log_loss(y, p.numpy()), rel=1e-6
    )
    assert posterior.accuracy(p, y) == np.mean(
        [int(row.argmax()) == int(label) for row, label in zip(p, y, strict=True)]
    )
    brier = np.mean(
        [
            sum((row[c] - (c == label)) ** 2 for c in range(4))
            for row, label in zip(p.tolist(), y.tolist(), strict=True)
        ]
    )
    assert posterior.brier_score(p, y) == pytest.approx(float(brier), rel=1e-5)
    found = posterior.scores(p, y)
    assert found["nll"] == posterior.negative_log_likelihood(p, y)
    assert found["ece"] == posterior.expected_calibration_error(p, y)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_written_out(bins: int) -> None:
    p, y = probabilities()
    confidence, right = p.double().max(1).values.numpy(), (p.argmax(1) == y).numpy()
    error = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert posterior.expected_calibration_error(p, y, bins) == pytest.approx(error, abs=1e-12)
    table = posterior.reliability(p, y, bins)
    assert int(table.number.sum()) == len(y)


def test_calibration_error_is_zero_for_labels_drawn_from_the_probabilities() -> None:
    p, _ = probabilities(200_000)
    y = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1)).flatten()
    assert posterior.expected_calibration_error(p, y) < 0.01
    overconfident = torch.softmax(2 * p.log(), 1)
    assert posterior.expected_calibration_error(overconfident, y) > 0.05


def test_certain_predictions() -> None:
    p, y = torch.eye(3, dtype=torch.float64), torch.arange(3)
    assert posterior.scores(p, y) == {"accuracy": 1.0, "nll": 0.0, "ece": 0.0, "brier": 0.0}
    assert posterior.scores(p, y.roll(1))["nll"] == float("inf")
    assert torch.equal(posterior.entropy(p), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("p", "y"),
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.long)),
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.long)),
        (torch.ones(3, 2), torch.full((3,), 2)),
        (torch.ones(3, 2), torch.zeros(3)),
        (torch.ones(0, 2), torch.zeros(0, dtype=torch.long)),
    ],
)
def test_scores_refuse_what_does_not_fit(p: torch.Tensor, y: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be"):
        posterior.scores(p, y)


# --- samples --------------------------------------------------------------------------------------


class Training:
    """DEEP R on random data, with batch normalization (buffers) and a dense head besides the sparse
    layers.
    """

    def __init__(self, cls: Any = DeepR, **parameters: Any) -> None:
        g = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = nn.Sequential(
            SparseLinear(8, 12, connections=30, generator=g),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            SparseLinear(12, 6, connections=20, generator=g),
            nn.Linear(6, 3),
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2)
        self.method = cls(
            self.model, self.optimizer, seed=1, **({"l1": 1e-2, "noise": 0.1} | parameters)
        )
        self.time = 0

    def step(self) -> None:
        g = torch.Generator().manual_seed(self.time)
        x, y = torch.randn(16, 8, generator=g), torch.randint(0, 3, (16,), generator=g)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.method.step()
        self.time += 1


def test_average_is_that_of_the_networks_there_were() -> None:
    run = Training()
    samples = Posterior(run.model, burn_in=7, every=3)
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(9))
    kept = []
    for step in range(1, 29):
        run.step()
        took = samples.update()
        assert took == (step > 7 and (step - 7) % 3 == 0)
        if took:
            kept.append(copy.deepcopy(run.model).eval())
    assert len(samples) == len(kept) == 7
    assert len({next(iter(dict(sparse_weights(m)).values())).fingerprint() for m in kept}) == 7
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    each = torch.stack([torch.softmax(m(x), 1) for m in kept]).double()
    found = samples.predict(x)
    assert found.count == 7
    torch.testing.assert_close(found.mean, each.mean(0), atol=1e-7, rtol=0)
    torch.testing.assert_close(found.std, each.std(0), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        found.expected_entropy, -(each * each.log()).sum(2).mean(0), atol=1e-7, rtol=0
    )
    torch.testing.assert_close(found.entropy - found.expected_entropy, found.mutual_information)
    assert float(found.mutual_information.min()) > 0
    parts = samples.predict([x[:4], x[4:]], link=lambda y: y)
    torch.testing.assert_close(
        parts.mean, torch.stack([m(x) for m in kept]).double().mean(0), atol=1e-6, rtol=0
    )
    assert run.model.training
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, before[key])
    run.step()  # nothing of the training was touched


def test_inclusion_counts_connections() -> None:
    run = Training()
    samples = Posterior(run.model, every=2)
    dense = []
    for _ in range(40):
        run.step()
        if samples.update():
            weight = dict(sparse_weights(run.model))["3.weight"]
            there = torch.zeros(weight.shape)
            rows, cols, values = weight.coo()
            there[rows, cols] = 1
            dense.append((there, weight.to_dense().detach().double()))
    share = torch.stack([t for t, _ in dense]).mean(0)
    found = samples.inclusion("3.weight")
    again = torch.zeros(6, 12, dtype=torch.float64)
    again[found.rows, found.cols] = found.probability
    torch.testing.assert_close(again, share.double())
    assert float(found.probability.sum()) == pytest.approx(20)
    assert 0 < float(found.probability.min()) < 0.5
    for row, col, mean, std in zip(found.rows, found.cols, found.mean, found.std, strict=True):
        values = torch.stack([v[row, col] for t, v in dense if t[row, col]])
        assert float(mean) == pytest.approx(float(values.mean()), abs=1e-9)
        assert float(std) == pytest.approx(
            float(values.std()) if len(values) > 1 else 0.0, abs=1e-9
        )
    torch.testing.assert_close(
        samples.inputs("3.weight"), torch.stack([t.amax(0) for t, _ in dense]).double().mean(0)
    )
    torch.testing.assert_close(
        samples.outputs("3.weight"), torch.stack([t.amax(1) for t, _ in dense]).double().mean(0)
    )
    assert len(samples.inputs()) == 8  # of the first weight by default


def test_a_limit_keeps_samples_evenly_spread() -> None:
    run = Training()
    samples, taken = Posterior(run.model, every=1, limit=4), []
    for _ in range(33):
        run.step()
        if samples.update():
            taken.append(run.time)
    assert taken == [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32]
    assert samples.every == 8
    assert len(samples) == 4  # of steps 8, 16, 24, 32
    last = samples.samples[-1]["0.weight.values"]
    assert len(last) == 30


def test_saving_and_going_on(tmp_path: Path) -> None:
    run = Training(SoftDeepR, theta_min=-0.05)  # samples of different sizes
    samples = Posterior(run.model, burn_in=2, every=2, limit=8)
    for _ in range(11):
        run.step()
        samples.update()
    assert len({len(s["0.weight.rows"]) for s in samples.samples}) > 1
    samples.save(tmp_path / "samples.safetensors")
    fresh = Training(SoftDeepR, theta_min=-0.05).model
    again = Posterior.load(tmp_path / "samples.safetensors", fresh)
    assert (again.burn_in, again.every, again.limit, again.steps) == (2, 2, 8, 11)
    x = torch.randn(5, 8)
    assert torch.equal(again.predict(x).mean, samples.predict(x).mean)
    assert not again.update() or len(again) == len(samples) + 1
    other = nn.Sequential(SparseLinear(9, 12, connections=30), nn.Linear(12, 3))
    with pytest.raises(ValueError, match="do not fit this model"):
        Posterior.load(tmp_path / "samples.safetensors", other)
    data = (tmp_path / "samples.safetensors").read_bytes()
    for bad in (b"", b"not a file", data[:-7]):
        (tmp_path / "bad.safetensors").write_bytes(bad)
        with pytest.raises(ValueError, match=r"no samples that rewire\.posterior can read"):
            Posterior.load(tmp_path / "bad.safetensors", fresh)


def test_every_layer_type_and_shared_weights() -> None:
    torch.manual_seed(2)
    shared = SparseLinear(6, 6, connections=12)
    conv = rewire.nn.SparseConv1d(2, 2, 3, padding=1, connections=6)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = (
                nn.Sequential(nn.Unflatten(1, (2, 6)), conv),
                shared,
                shared,
            )
            self.lstm = rewire.nn.SparseLSTM(6, 6, batch_first=True, density=0.3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.tanh(self.one(self.lstm(self.body(x))[0].sum(1))))

    net = Net()
    samples = Posterior(net)
    x = torch.randn(4, 12)
    samples.collect()
    expected = torch.softmax(net.eval()(x), 1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    torch.testing.assert_close(samples.predict(x).mean, expected.double(), atol=1e-6, rtol=0)
    assert float(samples.predict(x).std.max()) == 0


def test_refusals() -> None:
    run = Training()
    with pytest.raises(ValueError, match="no sparse weights"):
        Posterior(nn.Linear(2, 2))
    for bad in ({"burn_in": -1}, {"every": 0}, {"every": 1.5}, {"limit": 1}, {"every": True}):
        with pytest.raises(ValueError, match="must be a whole number of at least"):
            Posterior(run.model, **bad)  # type: ignore[arg-type]
    samples = Posterior(run.model, burn_in=3)
    assert len(samples) == 0
    assert samples, "`if posterior` asks whether there is one"
    for call in (lambda: samples.predict(torch.zeros(1, 8)), samples.inclusion, samples.inputs):
        with pytest.raises(ValueError, match="no sample yet, after 0 of 3 steps"):
            call()
    samples.collect()
    with pytest.raises(ValueError, match=r"called '1.weight': it has 0.weight, 3.weight"):
        samples.inclusion("1.weight")

"""The recorder: which activations are taken, and that nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

from rewire import ops
from rewire.methods import Static
from rewire.methods.criteria.activations import Recorder
from rewire.nn import SparseConv2d, SparseLinear, SparseMultiheadAttention, SparseRNN


def linear(inputs: int, outputs: int) -> SparseLinear:
    return SparseLinear(inputs, outputs, density=0.5, dtype=torch.float64)


def record(model: nn.Module, data: Any, *, seed: int = 3, step: int = 1, **options: Any) -> Any:
    pools = Static(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=0).pools
    return Recorder(model, data, **options).record(pools, seed, step)


def sides(model: nn.Module, data: Any, **options: Any) -> list[tuple[Tensor, Tensor]]:
    found, _ = record(model, data, **options)
    assert all(len(pairs) == 1 for pairs in found.values())
    return [(found[n][0].x, found[n][0].g) for n in sorted(found)]


def close(got: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine[0], theirs[0])
        torch.testing.assert_close(mine[1], theirs[1])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def data(rows: int = 10, features: int = 6) -> Tensor:
    return torch.randn(rows, features, dtype=torch.float64)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), linear(8, 8), nn.Tanh(), linear(8, 3)
    )


@torch.no_grad()
def test_before_activation_functions() -> None:
    model, x = mlp(), data()
    a = model[0](x)
    b = model[3](a.relu())
    c = model[5](b.tanh())
    got = sides(model, [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(6))])
    close(got, [(x, a), (a, b), (b, c)])
    assert record(model, [x])[1] == 2  # the output layer


@torch.no_grad()
def test_behind_activation_functions() -> None:
    model, x = mlp(), data()
    a = model[0](x).relu()
    b = model[3](a).tanh()
    close(sides(model, [x], activations="post"), [(x, a), (a, b), (b, model[5](b).softmax(1))])


@torch.no_grad()
def test_a_single_output_is_a_probability_and_a_dense_layer_between_counts() -> None:
    model, x = (
        nn.Sequential(linear(6, 6), nn.ReLU(), nn.Linear(6, 6, dtype=torch.float64), linear(6, 1)),
        data(),
    )
    a = model[0](x)
    b = model[2](a.relu())
    close(sides(model, [x]), [(x, a), (b, model[3](b))])
    close(sides(model, [x], activations="post"), [(x, a.relu()), (b, model[3](b).sigmoid())])


@torch.no_grad()
def test_convolutions() -> None:
    options: dict[str, Any] = {"density": 0.5, "dtype": torch.float64}
    model = nn.Sequential(
        SparseConv2d(2, 4, 3, padding=1, **options),
        nn.ReLU(),
        SparseConv2d(4, 4, 3, padding=1, padding_mode="circular", **options),
        nn.MaxPool2d(2),
        SparseConv2d(4, 6, 2, groups=2, **options),
        nn.Flatten(),
        linear(6, 3),
    )
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    a = model[0](x)
    b = model[2](a.relu())
    pooled = F.max_pool2d(b, 2)
    c = model[4](pooled)
    wrapped = F.pad(a, (1, 1, 1, 1), mode="circular")
    close(
        sides(model, [x[:2], x[2:]]),
        [(x, a), (wrapped, b), (pooled, c), (c.flatten(1), model[6](c.flatten(1)))],
    )


def test_the_inside_of_recurrent_layers_and_attention() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options: dict[str, Any] = {"density": 0.6, "batch_first": True, "dtype": torch.float64}
            self.rnn = SparseRNN(6, 4, **options)
            self.mix = SparseMultiheadAttention(4, 2, **options)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h, last = self.rnn(x)
            out: Tensor = self.mix(h, h, h)[0]
            return out, last

    model, x = Both(), torch.randn(3, 5, 6, dtype=torch.float64)
    found, output = record(model, [x])
    with torch.no_grad():
        h, _ = model.rnn(x)
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
    inner = {
        "rnn.weight_ih_l0": x,
        "rnn.weight_hh_l0": before,
        "mix.q_proj_weight": h,
        "mix.k_proj_weight": h,
        "mix.v_proj_weight": h,
    }
    pools = {
        p.name: p for p in Static(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=0).pools
    }
    for name, source in inner.items():
        (pair,) = found[pools[name].number]
        dense = pools[name].weight.to_dense().detach()
        torch.testing.assert_close(pair.g, pair.x @ dense.t())

        def ordered(rows: Tensor) -> Tensor:
            return rows[rows[:, 0].argsort(stable=True)]

        torch.testing.assert_close(ordered(pair.x), ordered(source.reshape(-1, source.shape[-1])))
    assert output == pools["mix.out_proj.weight"].number
    assert all(p.weight.values.grad is None and p.weight.capture is None for p in pools.values())


def test_a_layer_called_twice_and_one_not_called() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.idle = linear(6, 6), linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(self.a(x).relu())
            return out

    model, x = Shared(), data()
    found, output = record(model, [x])
    assert list(found) == [0]
    assert output == 0
    (pair,) = found[0]
    with torch.no_grad():
        first = model.a(x)
        torch.testing.assert_close(pair.x, torch.cat([x, first]))
        torch.testing.assert_close(pair.g, torch.cat([first, model.a(first.relu())]))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_nothing_is_left_behind(mode: Any) -> None:
    model = nn.Sequential(
        linear(6, 8), nn.BatchNorm1d(8, dtype=torch.float64), nn.Dropout(0.5), linear(8, 3)
    )
    model.train()
    model[2].eval()
    model[0].weight.capture = held = []
    shuffled = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data(12)), batch_size=5, shuffle=True
    )
    state, random_state = (
        {k: v.clone() for k, v in model.state_dict().items()},
        torch.get_rng_state(),
    )
    first = record(model, shuffled, mode=mode, samples=7)[0]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model[0].weight.capture is held
    assert held == []
    assert not model[0]._forward_hooks
    torch.manual_seed(99)
    again, other = (
        record(model, shuffled, mode=mode, samples=7)[0],
        record(model, shuffled, step=2, samples=7)[0],
    )
    assert torch.equal(first[1][0].g, again[1][0].g)  # a function of seed and step
    assert not torch.equal(first[1][0].g, other[1][0].g)


def test_an_error_in_the_model_leaves_nothing_behind_either() -> None:
    model = nn.Sequential(linear(6, 4), linear(5, 3)).train()
    with pytest.raises(RuntimeError):
        record(model, [data()])
    assert model.training
    assert not model[0]._forward_hooks


@torch.no_grad()
def test_training_mode_has_dropout_on() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5), linear(6, 8)), data(40)
    (source, _), (plain, _) = sides(model, [x], mode="train")[0], sides(model, [x])[0]
    assert torch.equal(plain, x)
    assert 0.3 < (source == 0).double().mean() < 0.7


def test_samples_are_rows_without_replacement_and_new_every_time() -> None:
    model, x = linear(6, 4), data(30)
    batches = [x[:7], x[7:8], x[8:30]]
    drawn = []
    for step in range(200):
        rows = record(model, batches, samples=10, step=step)[0][0][0].x
        places = (rows[:, None] == x[None]).all(2).nonzero()[:, 1]
        assert places.unique().numel() == 10
        drawn.append(places)
    counts = torch.bincount(torch.cat(drawn), minlength=30)
    assert counts.min() > 35  # 66.7 expected, standard deviation 6.7
    assert counts.max() < 100
    assert record(model, batches, samples=1000)[0][0][0].x.shape[0] == 30


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (iter([1]), {}, "used up after once"),
        (3, {}, "again and again"),
        ([data()], {"samples": 0}, "at least 1"),
        ([data()], {"mode": "both"}, "mode must be one of 'eval', 'train'"),
        ([data()], {"activations": "middle"}, "activations must be one of 'pre', 'post'"),
        ([{"x": data()}], {}, "as tensors, not dict"),
        ([pack_sequence([data()])], {"samples": 4}, "cannot pick rows of packed sequences"),
    ],
)
def test_bad_data_are_refused(given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(linear(6, 4), given, **options)


def test_packed_sequences() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = SparseRNN(6, 4, density=0.5, dtype=torch.float64)

        def forward(self, x: Any) -> Tensor:
            out: Tensor = self.rnn(x)[0].data
            return out

    packed = pack_sequence([data(4), data(2)])
    pair = record(Reader(), [(packed, torch.zeros(2))])[0][0][0]
    assert isinstance(pair, ops.Pair)
    assert torch.equal(pair.x, packed.data)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself, in dynamo
@torch.no_grad()
def test_a_compiled_model_is_looked_at_too() -> None:
    """Without being compiled again: neither for the hooks nor after them."""
    compilations = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    model, x = mlp().eval(), data()
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    before, expected = compilations, sides(model, [x])
    close(sides(compiled, [x]), expected)
    compiled(x)
    assert compilations == before

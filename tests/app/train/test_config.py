import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import toy
from rewire.app.errors import TrainError
from rewire.app.train.batches import Batches, make_generator, split
from rewire.app.train.config import (
    TrainConfig,
    difference,
    make_config,
    method_options,
    parse_config,
)
from rewire.app.train.method_options import parse_method_options
from rewire.app.train.model import layer_connections, layer_shapes
from rewire.nn.layers.perceptron import perceptron


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"density": [0.0]},
            "--density: given 0.0, allowed is a number greater than 0 and at most 1",
        ),
        ({"density": [-0.1]}, "--density: given -0.1, allowed"),
        ({"density": [1.5]}, "--density: given 1.5, allowed"),
        ({"density": [math.nan]}, "--density: given nan, allowed"),
        ({"density": [math.inf]}, "--density: given inf, allowed"),
        (
            {"density": [0.1, 0.1]},
            "given 2 numbers for 3 layers .* one number for the whole network or 3",
        ),
        ({"density": [0.1], "connections": 5}, "give one of them"),
        ({"density": [0.1] * 3, "distribution": "er"}, "with one density per layer leave it out"),
        ({"connections": 0}, "--connections: given 0, allowed is a number greater than 0"),
        ({"hidden": [300, 0]}, "--hidden: given 0, allowed is sizes from 1 to"),
        ({"lr": 0}, "--lr: given 0, allowed is a number greater than 0"),
        ({"lr": math.nan}, "--lr: given nan"),
        ({"lr_decay": -1}, "--lr-decay: given -1"),
        ({"momentum": 1}, "--momentum: given 1, allowed is a number less than 1"),
        ({"momentum": 0.9, "optimizer": "adam"}, "--momentum: adam has none"),
        ({"epochs": 0}, "--epochs: given 0"),
        ({"batch_size": 0}, "--batch-size: given 0"),
        ({"seed": -1}, "--seed: given -1, allowed is a number at least 0"),
        ({"seed": 2**63}, "--seed: given 9223372036854775808"),
        ({"validation": 1}, "--validation: given 1, allowed is a number less than 1"),
        (
            {"optimizer": "adm"},
            r"--optimizer: unknown name 'adm' \(did you mean 'adam'\?\); "
            r"allowed are sgd, ",
        ),
        ({"batchsize": 3}, r"unknown option 'batchsize' \(did you mean 'batch_size'\?\)"),
    ],
)
def test_refused(options, message: str) -> None:
    with pytest.raises(TrainError, match=message) as caught:
        make_config(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "optimizer", "lr", "options"),
    [
        ("deep-r", "adam", 0.01, {"l1": 0.1}),
        ("l1", "adam", 0.01, {"l1": 0.1}),
        ("set", "adam", 0.01, {"fraction": 0.15}),
        ("mest", "adam", 0.01, {}),
        ("ternary", "sgd", 0.5, {"after_epochs": 10, "threshold_lr": 0.5}),
        ("noiseout", "adam", 0.002, {"warmup": 10}),
        ("differentiable", "adam", 0.002, {}),
        ("halo", "sgd", 0.5, {"after_epochs": 15}),
        ("magnitude", "adam", 0.01, {"cycles": 5, "every_epochs": 3}),
        ("one-shot", "adam", 0.01, {"after_epochs": 10}),
    ],
)
def test_defaults_that_suit_the_method(
    method: str, optimizer: str, lr: float, options: dict[str, int]
) -> None:
    config = make_config({"method": method})
    assert (config.optimizer, config.lr, method_options(config)) == (optimizer, lr, options)
    assert config.init == "auto"
    assert config.lr_decay is None
    assert parse_config(config.to_json(), "x") == config, "resuming adds nothing"
    assert make_config({"method": method, "optimizer": "sgd"}).optimizer == "sgd"
    assert make_config({"method": method, "momentum": 0.9}).optimizer == "sgd"


@pytest.mark.parametrize("method", ["deep-r", "l1"])
def test_l1_takes_as_much_in_long_runs(method: str) -> None:
    config = make_config({"method": method})
    for steps, l1 in ((10, 0.1), (1500, 0.1), (15_000, 0.01), (150_000, 0.001)):
        assert method_options(config, steps) == {"l1": pytest.approx(l1)}
    assert method_options(make_config({"method": method, "optimizer": "sgd"}), 15_000) == {}
    given = make_config({"method": method, "method_options": {"l1": 1e-5}})
    assert method_options(given, 15_000) == {"l1": 1e-5}


def test_what_is_given_goes_before_what_suits() -> None:
    given = {"method": "noiseout", "method_options": {"required_score": 0.9}}
    assert method_options(make_config(given)) == {"required_score": 0.9}
    assert method_options(make_config({"method": "noiseout", "method_options": {"warmup": 0}})) == {
        "warmup": 0
    }
    assert method_options(
        make_config({"method": "halo", "method_options": {"after_epochs": None}})
    ) == {"after_epochs": None}
    assert method_options(make_config({"method": "halo", "epochs": 1})) == {}, (
        "no epoch to train what is left"
    )
    for epochs, given, expected in (
        (1, {}, {}),
        (2, {}, {"after_epochs": 1}),
        (41, {}, {"after_epochs": 20}),
    ):
        options = {"method": "ternary", "epochs": epochs, "method_options": given}
        assert method_options(make_config(options)) == {"threshold_lr": 0.5} | expected
    given = {"after_epochs": "auto", "threshold_lr": 2.0}
    assert method_options(make_config({"method": "ternary", "method_options": given})) == given
    for epochs, given, expected in (
        (3, {}, {"cycles": 2, "every_epochs": 1}),
        (1, {}, {"cycles": 1, "every_epochs": 1}),
        (40, {"cycles": 10}, {"cycles": 10, "every_epochs": 3}),
        (40, {"every_epochs": 2}, {"cycles": 5, "every_epochs": 2}),
        (4, {"every_epochs": 2}, {"cycles": 1, "every_epochs": 2}),
        (4, {"cycles": 10}, {"cycles": 10, "every_epochs": 1}),
        (40, {"cycles": 4, "every_epochs": 3}, {"cycles": 4, "every_epochs": 3}),
    ):
        options = {"method": "magnitude", "epochs": epochs, "method_options": given}
        assert method_options(make_config(options)) == expected
    assert method_options(make_config({"method": "one-shot", "epochs": 1})) == {"after_epochs": 1}
    options = {"method": "one-shot", "epochs": 12, "method_options": {"scope": "network"}}
    assert method_options(make_config(options)) == {"scope": "network", "after_epochs": 6}
    one = {"method": "one-shot", "method_options": {"after": 7}}
    assert method_options(make_config(one)) == {"after": 7}


def test_defaults_and_json() -> None:
    config = make_config({})
    assert config.density == (0.1,)
    assert config.distribution == "erk"
    assert (config.optimizer, config.lr) == ("adam", 0.01)
    by_momentum = make_config({"momentum": 0.9})
    assert (by_momentum.optimizer, by_momentum.lr) == ("sgd", 0.05)
    assert by_momentum.method_options == {}, "the paper's L1 is for SGD"
    assert make_config({"optimizer": "sgd"}).lr == 0.5
    assert make_config({"method": "noiseout", "optimizer": "sgd"}).lr == 0.5
    assert make_config({"method": "noiseout", "optimizer": "adam", "lr": 0.3}).lr == 0.3
    assert method_options(make_config({"method_options": {"l1": 1e-5}})) == {"l1": 1e-5}
    assert parse_config(config.to_json(), "x") == config
    assert make_config({"density": [0.1, 0.2, 0.3]}).distribution is None
    assert len(config.sha256()) == 64
    assert config.sha256() == make_config({"data_dir": "/x", "threads": 7}).sha256()
    assert config.sha256() != make_config({"seed": 1}).sha256()


@pytest.mark.parametrize("text", ["{", "[]", '{"lr": -1}', '{"nothing": 1}'])
def test_damaged_config_is_named(text: str) -> None:
    with pytest.raises(TrainError, match=r"^runs/x/config\.json"):
        parse_config(text, "runs/x/config.json")


def test_difference_names_the_option() -> None:
    config = make_config({"hidden": [3], "lr": 0.5, "method_options": {"l1": 0.1}})
    assert (
        difference(
            config, {"lr": 0.5, "hidden": [3], "data_dir": "/elsewhere", "checkpoint_every": 9}
        )
        is None
    )
    assert difference(config, {"lr": 0.1}) == "--lr: the run has 0.5, given 0.1"
    assert difference(config, {"hidden": [3, 4]}) == "--hidden: the run has 3, given 3,4"
    assert difference(config, {"bias": False}) == "--no-bias: the run has True, given False"
    assert ("--set: the run has l1=0.1, given l1=0.2") in difference(
        config, {"method_options": {"l1": 0.2}}
    )


SHAPES = layer_shapes(784, (300, 100), 10)


def test_the_authors_budget() -> None:
    config = make_config({"density": [0.01, 0.03, 0.3]})
    assert layer_connections(config, SHAPES) == [2352, 900, 300]


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=5),
    st.fractions(Fraction(1, 100), 1),
    st.sampled_from(["erk", "er", "uniform"]),
)
def test_budgets_sum_to_the_total_or_are_refused(sizes, share, distribution) -> None:
    shapes = layer_shapes(sizes[0], sizes[1:-1], sizes[-1])
    possible = [rows * cols for rows, cols in shapes]
    total = max(1, round(share * sum(possible)))
    config = make_config(
        {"hidden": sizes[1:-1], "connections": total, "distribution": distribution}
    )
    if total < len(shapes):
        with pytest.raises(TrainError, match="--connections"):
            layer_connections(config, shapes)
        return
    counts = layer_connections(config, shapes)
    assert sum(counts) == total
    assert all(1 <= count <= m for count, m in zip(counts, possible, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"density": [1e-9]},
            r"--density 1e-09: 0 connections for layer 1 \(784 inputs, 300 "
            r"outputs\).* 3 .* 266200",
        ),
        ({"connections": 2}, "2 connections .* allowed are 3 .one per layer. to 266200"),
        ({"connections": 266201}, "allowed are 3 .* to 266200"),
        (
            {"density": [0.01, 0.03, 1e-5]},
            r"1e-05 gives layer 3 \(100 inputs, 10 outputs\) 0 .* 1 "
            r"to 1000",
        ),
        (
            {"density": [0.1], "distribution": "erg"},
            r"'erg' \(did you mean 'er.*allowed are "
            r"uniform, er, erk",
        ),
    ],
)
def test_budgets_that_do_not_fit(options, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        layer_connections(make_config(options), SHAPES)


def test_model_comes_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = perceptron(SHAPES, [50, 40, 30], make_generator(3, "model"))
    torch.manual_seed(2)
    second = perceptron(SHAPES, [50, 40, 30], make_generator(3, "model"))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("samples", "size"), [(20, 6), (20, 5), (20, 50), (1, 1)])
def test_every_sample_once_an_epoch_in_an_order_of_its_own(samples: int, size: int) -> None:
    data = toy.tiny(samples)
    x, y = data.train_x, torch.arange(samples)
    batches = Batches(x, y, size, seed=5)
    whole = list(batches.epoch(0))
    assert len(whole) == len(batches) == math.ceil(samples / size)
    order = torch.cat([labels for _, labels in whole])
    assert order.sort().values.tolist() == list(range(samples))
    for inputs, labels in whole:
        assert torch.equal(inputs, x[labels])
    assert not samples > 5 or order.tolist() != torch.cat([b for _, b in batches.epoch(1)]).tolist()
    for start in range(len(batches) + 1):
        rest = list(batches.epoch(0, start))
        assert [b.tolist() for _, b in rest] == [b.tolist() for _, b in whole[start:]]


def test_batches_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy.tiny(31)
    batches = Batches(data.train_x, data.train_y, 4, seed=0)
    whole = list(batches.epoch(2))
    monkeypatch.setattr("rewire.app.train.batches.BLOCK_NUMBERS", 1)
    for (x1, y1), (x2, y2) in zip(whole, batches.epoch(2), strict=True):
        assert torch.equal(x1, x2)
        assert torch.equal(y1, y2)


def test_split_is_disjoint_and_seeded() -> None:
    x, y = toy.tiny(50).train_x, torch.arange(50)
    (_, kept), (_, held) = split(x, y, 0.3, seed=1)
    assert len(held) == 15
    assert sorted(kept.tolist() + held.tolist()) == list(range(50))
    assert (
        split(x, y, 0.3, seed=1)[1][1].tolist()
        == held.tolist()
        != split(x, y, 0.3, seed=2)[1][1].tolist()
    )
    assert len(split(x, y, 0.0, seed=1)[1][1]) == 0


def test_method_options_are_typed_by_the_registry() -> None:
    parsed = parse_method_options("deep-r", ["l1=1e-5", "scope=network", "every=2"])
    assert parsed == {"l1": 1e-5, "scope": "network", "every": 2}
    assert type(parsed["every"]) is int
    assert parse_method_options("static", []) == {}
    assert parse_method_options("deep-r", ["l1=1e-5, 2e-5,0", "temperature=tied"]) == {
        "l1": [1e-5, 2e-5, 0],
        "temperature": "tied",
    }
    assert parse_method_options("deep-r", ["l1=0.*:1e-5,*:0.5"]) == {"l1": {"0.*": 1e-5, "*": 0.5}}
    config = make_config({"method_options": {"l1": {"0.*": 1e-5, "*": 1}}})
    assert parse_config(config.to_json(), "config.json") == config


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("l1", "--set l1: write it as name=value"),
        ("=1", "write it as name=value"),
        ("nois=1", r"deep-r has no such parameter \(did you mean 'noise'\?\); allowed are .*l1"),
        ("l1=much", "--set l1=much: allowed is a number"),
        ("l1=1e-5,much", "--set l1=1e-5,much: allowed is a number or numbers, one per layer"),
        ("l1=*:1,2", "--set l1=\\*:1,2: allowed is a number or numbers, one per layer"),
        ("every=1.5", "--set every=1.5: allowed is a whole number"),
        ("seed=1", "--set seed: the whole run has one seed"),
    ],
)
def test_method_options_refused(pair: str, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        parse_method_options("deep-r", [pair])


def test_twice_is_refused() -> None:
    with pytest.raises(TrainError, match="given twice"):
        parse_method_options("deep-r", ["l1=1", "l1=2"])


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().lr = 1.0  # type: ignore[misc]

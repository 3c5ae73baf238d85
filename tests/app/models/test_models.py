"""Every network that `--model` names trains, is made sparse, stops and goes on to the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import toy
from rewire.app import report
from rewire.app.data import Dataset
from rewire.app.errors import StoppedError, TrainError
from rewire.app.models import Signature, build, parse
from rewire.app.models.sequences import BidirectionalLSTM, lengths
from rewire.app.train import loop
from rewire.app.train.config import make_config
from rewire.app.train.parts import assemble
from rewire.app.train.run_dir import RunDir
from rewire.nn import sparse_weights

IMAGES = Signature((3, 32, 32), 10)
TEXT = Signature((16,), 11, each_step=True, tokens=11)


@pytest.mark.parametrize(
    ("name", "signature", "parameters"),
    [
        # counted by hand from the papers' layer sizes
        ("lenet5", Signature((28, 28), 10), 61_706),
        ("cifar-cnn", IMAGES, 4864 + 102_464 + (4096 + 1) * 384 + 385 * 192 + 193 * 10),
        ("wrn-22-2", IMAGES, 1_079_642),
        ("resnet18", IMAGES, 11_173_962),
        ("lstm:200", Signature((20, 39), 10), 2 * 4 * 200 * (39 + 200 + 2) + 401 * 10),
        ("gpt:4x256", TEXT, 4 * (12 * 256**2 + 13 * 256) + 2 * 11 * 256 + 16 * 256 + 11 + 2 * 256),
    ],
)
def test_sizes(name: str, signature: Signature, parameters: int) -> None:
    with torch.device("meta"):
        model = build(name, signature)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lenet", r"unknown name 'lenet' \(did you mean 'lenet5'\?\)"),
        ("wrn-21-2", "allowed are depths of 10, 16"),
        ("lstm:0", "allowed are sizes of at least 1"),
        ("gpt:4", "unknown name 'gpt:4'"),
        ("nosuch.module:thing", "unknown name 'nosuch.module:thing'"),
        ("math.no.such:thing", "cannot be loaded: ModuleNotFoundError"),
        ("math:pi", "is a float, allowed is something to call"),
        ("sys:exit", "cannot be made: SystemExit"),
        ("builtins:dict", "returned a dict, allowed is a torch.nn.Module"),
    ],
)
def test_what_is_no_network(name: str, message: str) -> None:
    with pytest.raises(TrainError, match=message) as caught:
        build(name, IMAGES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "signature"),
    [("lenet5", TEXT), ("lenet5", Signature((8, 8), 10)), ("lstm:8", IMAGES), ("gpt:1x8", IMAGES)],
)
def test_networks_refuse_samples_they_cannot_read(name: str, signature: Signature) -> None:
    with pytest.raises(TrainError, match="--model: "):
        build(name, signature)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    short = torch.randn(1, 5, 3)
    padded = torch.cat([short, torch.zeros(1, 4, 3)], 1)
    longer = torch.randn(1, 9, 3)
    batch = torch.cat([padded, longer])
    assert lengths(batch).tolist() == [5, 9]
    model = BidirectionalLSTM(3, 2, 4, each_step=False)
    torch.testing.assert_close(model(batch), torch.cat([model(short), model(longer)]))


def test_a_transformer_sees_no_later_token() -> None:
    model = build("gpt:2x16", TEXT).eval()
    x = torch.randint(0, 11, (1, 16))
    changed = x.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 11
    torch.testing.assert_close(model(x)[:, :9], model(changed)[:, :9])


def images(samples: int = 24) -> Dataset:
    x = torch.rand(samples, 3 * 16 * 16)
    y = torch.arange(samples) % 3
    return Dataset("images", x, y, x, y, ("a", "b", "c"), (3, 16, 16), augment=("crop", "flip"))


def text(samples: int = 24) -> Dataset:
    x = torch.randint(0, 11, (samples, 17))
    names = tuple("abcdefghijk")
    ins, outs = x[:, :-1].contiguous(), x[:, 1:].contiguous()
    return Dataset("text", ins, outs, ins, outs, names, tokens=11)


def sequences(samples: int = 24) -> Dataset:
    x = torch.randn(samples, 6 * 4)
    y = torch.arange(samples) % 3
    return Dataset("sounds", x, y, x, y, ("a", "b", "c"), shape=(6, 4), padded=True)


RUNS: dict[str, tuple[Dataset, dict[str, Any]]] = {
    "cnn": (images(), {"model": "cifar-cnn", "density": [0.01], "method": "rigl"}),
    "wrn": (images(), {"model": "wrn-10-1", "method": "set", "exclude": ["0"]}),
    "lstm": (sequences(), {"model": "lstm:5", "method": "deep-r"}),
    "gpt": (text(), {"model": "gpt:1x16", "method": "set", "clip": 0.5, "warmup": 0.5}),
    "dense start": (images(), {"model": "wrn-10-1", "method": "halo"}),
    "dense": (sequences(), {"model": "lstm:5", "method": "dense"}),
    "small": (text(), {"model": "gpt:1x32", "method": "small-dense", "density": [0.5]}),
    "half": (images(), {"model": "wrn-10-1", "method": "static", "precision": "bfloat16"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_and_resumes_to_the_same_bits(tmp_path: Path, name: str) -> None:
    data, changes = RUNS[name]
    config = make_config({"epochs": 2, "batch_size": 8, "threads": 1, **changes})
    result = loop.run(config, data, RunDir(tmp_path / "whole"))
    stops = iter([0, 15, 15])
    with pytest.raises(StoppedError):
        loop.run(config, data, RunDir(tmp_path / "two"), stop=lambda: next(stops))
    loop.run(config, data, RunDir(tmp_path / "two"), resume=True)
    assert toy.outcome(tmp_path / "two") == toy.outcome(tmp_path / "whole")
    if "density" in changes and changes["method"] not in ("small-dense",):
        assert result["density"] == pytest.approx(changes["density"][0], rel=0.02)
    assert report.write(tmp_path / "whole").exists()


def test_a_small_dense_network_has_as_many_parameters_as_the_sparse_one() -> None:
    options = {"hidden": [30, 20], "density": [0.2], "threads": 1}
    sizes = {}
    for method in ("static", "small-dense"):
        parts = assemble(make_config({**options, "method": method}), toy.dataset())
        sizes[method] = sum(p.numel() for p in parts.model.parameters())
        assert parts.whole == 64 * 30 + 30 * 20 + 20 * 10
    assert 0.9 * sizes["static"] < sizes["small-dense"] <= sizes["static"]


def own(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, outputs))


def wrong(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs + 1))


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    options = {"epochs": 1, "threads": 1, "batch_size": 200, "density": [0.5]}
    config = make_config({**options, "model": f"{__name__}:own", "method": "set"})
    made = loop.Trainer(assemble(config, toy.dataset()), RunDir(tmp_path))
    assert [tuple(w.shape) for _, w in sparse_weights(made.model)] == [(7, 64), (10, 7)]
    loop.run(config, toy.dataset(), RunDir(tmp_path / "run"))
    config = make_config({**options, "model": f"{__name__}:wrong"})
    with pytest.raises(TrainError, match=r"gives \(2, 11\) .* needed is a tensor of \(2, 10\)"):
        loop.run(config, toy.dataset(), RunDir(tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()
    config = make_config({**options, "model": f"{__name__}:own", "method": "small-dense"})
    with pytest.raises(TrainError, match="give the callable a parameter width"):
        loop.run(config, toy.dataset(), RunDir(tmp_path / "small"))


def test_names_of_models() -> None:
    assert parse("mlp") is None
    assert make_config({"model": "mlp:5,4"}).hidden == (5, 4)
    assert make_config({"model": "mlp:5,4"}).model == "mlp"
    with pytest.raises(TrainError, match="give the sizes once"):
        make_config({"model": "mlp:5,4", "hidden": "5"})
    with pytest.raises(TrainError, match="--hidden: this is for mlp"):
        make_config({"model": "lenet5", "hidden": [3]})

from pathlib import Path

import pytest
import torch
from rich.console import Console

import toy
from rewire.app.errors import StoppedError, TrainError
from rewire.app.report import figures
from rewire.app.report.read import read_run
from rewire.app.train import display, loop
from rewire.app.train.metrics import EpochRecord, evaluate
from rewire.app.train.model import make_optimizer
from rewire.app.train.observer import Progress
from rewire.app.train.parts import assemble
from rewire.app.train.run_dir import RunDir
from rewire.nn import sparse_weights


def trainer(folder: Path, **changes) -> loop.Trainer:
    return loop.Trainer(assemble(toy.config(**changes), toy.dataset()), RunDir(folder))


def test_one_thread_for_small_steps_and_the_choice_is_kept(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        made = trainer(tmp_path, threads=None)
        assert made.config.threads == 1 == torch.get_num_threads()
        torch.set_num_threads(2)
        assert trainer(tmp_path, threads=None, batch_size=10**6).config.threads == 2
        assert trainer(tmp_path, threads=1, batch_size=10**6).config.threads == 1
    finally:
        torch.set_num_threads(before)
    loop.run(toy.config(threads=None), toy.dataset(), RunDir(tmp_path))
    assert RunDir(tmp_path).read_config().threads == 1


def test_metrics_are_what_they_say(tmp_path: Path) -> None:
    records: list[EpochRecord] = []

    class Watcher(loop.Observer):
        def epoch_ended(self, record: EpochRecord) -> None:
            records.append(record)

    made = trainer(tmp_path, validation=0.2)
    made.run_dir.start(made.config, overwrite=False)
    made.begin()
    made.train(Watcher(), lambda: 0)
    assert [record.epoch for record in records] == [1, 2]
    assert [record.step for record in records] == [5, 10]
    assert [record.lr for record in records] == [0.3, 0.3 * 0.9]
    last = records[-1]
    assert (last.validation_loss, last.validation_accuracy) == evaluate(made.model, *made.held_out)
    assert last.connections == [weight.connections for _, weight in sparse_weights(made.model)]
    assert sum(last.connections) == round(0.2 * (64 * 12 + 12 * 9 + 9 * 10))
    total = made.method.stats()
    assert sum(sum(record.grown) for record in records) == sum(total["grown"].values()) > 0
    for record in records:
        assert record.turnover == [
            g / k for g, k in zip(record.grown, record.connections, strict=True)
        ]


def test_evaluation_leaves_the_model_as_it_was() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Dropout())
    data = toy.tiny(2500)
    model.train()
    loss, accuracy = evaluate(model, data.test_x, data.test_y)
    assert model.training
    logits = model.eval()(data.test_x).detach()
    assert loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, data.test_y)), rel=1e-5
    )
    assert accuracy == float((logits.argmax(1) == data.test_y).double().mean())


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_optimizers_get_their_options(name: str) -> None:
    momentum = 0.5 if name in ("sgd", "rmsprop") else 0
    config = toy.config(optimizer=name, lr=0.25, weight_decay=0.01, momentum=momentum)
    optimizer = make_optimizer(config, torch.nn.Linear(2, 2))
    assert type(optimizer).__name__.lower() == name
    groups = optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]  # the bias has none
    assert [[p.dim() for p in group["params"]] for group in groups] == [[2], [1]]
    for group in groups:
        assert (group["lr"], group.get("momentum", 0)) == (0.25, momentum)


def test_bar_shows_the_run(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w+") as file:
        console = Console(
            file=file, force_terminal=True, width=150, highlight=False, color_system=None
        )
        bar = display.LiveBar(console)
        info = {
            "layers": [{"inputs": 4, "outputs": 2, "connections": 3}],
            "samples": {"train": 5, "validation": 1, "test": 2},
        }
        bar.started(info, 2, 10, 4)
        bar.progress(Progress(1, 7, 0.5, 0.25, 3, 0.125))
        bar.bar.refresh()
        bar.epoch_ended(EpochRecord(1, 10, 0.1, 0.5, 0.25, None, None, [3], [1], [1], [1 / 3], 1.0))
        assert bar.bar.tasks[0].completed == 10
        bar.close()
        file.seek(0)
        text = file.read()
    for part in (
        "4-2, 3 of 8 connections (37.50%)",
        "resumed after step 4 of 20",
        "7/20",
        "acc 25.0%",
        "loss 0.500",
    ):
        assert part in text
    assert "active 3  turnover 12%" in text
    assert (
        "epoch 1/2  train loss 0.5000  train accuracy 25.00%  connections 3  turnover 33%"
    ) in text


def test_download_lines_and_bar(tmp_path: Path) -> None:
    for terminal in (False, True):
        with open(tmp_path / "out", "w+") as file:
            shown = display.DownloadBar(Console(file=file, force_terminal=terminal, width=100))
            for done in (10, 20):
                shown("a.gz", done, 20)
            shown.close()
            file.seek(0)
            text = file.read()
        assert "a.gz" in text
        assert terminal or text == "downloading a.gz, 20 bytes\n"


SHRINKING = {
    "snip": {"batches": 2},
    "one-shot": {"after_epochs": 1},
    "magnitude": {"cycles": 2, "every_epochs": 1},
    "l1": {"l1": 0.003},
}


@pytest.mark.parametrize("name", SHRINKING)
def test_methods_that_come_down_to_the_budget(tmp_path: Path, name: str) -> None:
    changes = {
        "method": name,
        "method_options": SHRINKING[name],
        "epochs": 3,
        "momentum": 0.5,
        "lr": 0.1,
    }
    result = loop.run(toy.config(**changes), toy.dataset(), RunDir(tmp_path / "whole"))
    possible, budget = 64 * 12 + 12 * 9 + 9 * 10, round(0.2 * (64 * 12 + 12 * 9 + 9 * 10))
    assert result["connections"] <= budget
    assert name == "l1" or result["connections"] == budget
    assert [layer["connections"] for layer in result["info"]["layers"]] == [64 * 12, 12 * 9, 9 * 10]
    assert sum(layer["budget"] for layer in result["info"]["layers"]) == budget
    assert "connections (100.00%) to end with 193" in display.heading(result["info"])
    counts = [sum(line["connections"]) for line in toy.outcome(tmp_path / "whole")[1]]
    assert name == "l1" or counts == sorted(counts, reverse=True)
    assert counts[0] < possible
    # Stopped where the pools have shrunk, and resumed, it is the same run.
    stops = iter([0] * 8 + [15])
    with pytest.raises(StoppedError):
        loop.run(
            toy.config(**changes), toy.dataset(), RunDir(tmp_path / "two"), stop=lambda: next(stops)
        )
    loop.run(toy.config(**changes), toy.dataset(), RunDir(tmp_path / "two"), resume=True)
    assert toy.outcome(tmp_path / "two") == toy.outcome(tmp_path / "whole")
    assert "falling" in figures.active(read_run(tmp_path / "two")).note


def test_start_density(tmp_path: Path) -> None:
    made = trainer(tmp_path, method="one-shot", method_options={}, start_density=0.5)
    assert [w.connections for _, w in sparse_weights(made.model)] == [384, 54, 45]
    assert made.method.final is not None
    assert sum(made.method.final) == 193
    made = trainer(tmp_path, method="one-shot", method_options={}, start_density=0.21)
    assert made.method.final is not None
    each = [max(round(0.21 * m), k) for m, k in zip((768, 108, 90), made.method.final, strict=True)]
    assert [w.connections for _, w in sparse_weights(made.model)] == each, (
        "a layer that ends denser begins with its budget"
    )
    assert any(k > round(0.21 * m) for m, k in zip((768, 108, 90), made.method.final, strict=True))
    with pytest.raises(
        TrainError,
        match=r"--start-density: 0\.01 is 10 connections, and the network is to end "
        r"with 193",
    ):
        trainer(tmp_path, method="one-shot", method_options={}, start_density=0.01)
    with pytest.raises(TrainError, match="--start-density: set has its budget from the start"):
        trainer(tmp_path, method="set", method_options={}, start_density=0.5)


def test_methods_that_look_at_activations_get_the_training_part(tmp_path: Path) -> None:
    changes = {"method": "codacorset", "method_options": {"samples": 500}, "validation": 0.25}
    made = loop.Trainer(assemble(toy.config(**changes), toy.dataset()), RunDir(tmp_path))
    seen = torch.cat(list(made.method.drop.source.recorder.data))
    assert torch.equal(seen, made.batches.x)
    result = loop.run(toy.config(**changes), toy.dataset(), RunDir(tmp_path / "run"))
    assert result["connections"] == sum(w.connections for _, w in sparse_weights(made.model))


def test_a_method_that_needs_a_score_says_so(tmp_path: Path) -> None:
    changes = {"method": "ctre", "method_options": {"variant": "seq"}, "validation": 0.0}
    with pytest.raises(TrainError, match=r"--method ctre: .*validation score"):
        loop.run(toy.config(**changes), toy.dataset(), RunDir(tmp_path / "run"))


def test_limits_of_hardware_hold_to_the_end(tmp_path: Path) -> None:
    changes = {
        "connections": 200,
        "density": None,
        "fan_in": 15,
        "fan_out": 8,
        "block": (6, 16, 20),
    }
    result = loop.run(toy.config(**changes), toy.dataset(), RunDir(tmp_path / "deep-r"))
    assert result["connections"] == 200
    for layer in read_run(tmp_path / "deep-r").layers:
        assert layer.fan_in.high <= 15
        assert layer.fan_out.high <= 8
    # a dense start: what the limits allow
    made = trainer(tmp_path, method="snip", method_options={}, **changes)
    assert [w.connections for _, w in sparse_weights(made.model)] == [160, 40, 40]
    with pytest.raises(
        TrainError,
        match=r"--block: layer 1 \(64 inputs, 12 outputs\).* at most "
        r"12 fit",
    ):
        trainer(tmp_path, fan_in=1)
    with pytest.raises(TrainError, match="does not keep a limit on fan-in"):
        trainer(tmp_path, fan_in=64, method_options={"scope": "network"})

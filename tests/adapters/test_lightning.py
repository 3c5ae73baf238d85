"""The callback for Lightning: it does what a loop of one's own does, and resumes to the same
bits.
"""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import loops
import rewire
from rewire import methods
from rewire.app.models import images

lightning = pytest.importorskip("lightning", reason="needs the extra lightning")

from rewire.lightning import RewireCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_rewires_where_a_loop_of_ones_own_does(tmp_path: Path, precision: str) -> None:
    """With accumulated gradients and clipping, also of a last group that is not full."""
    torch.manual_seed(0)
    module = loops.lightning_module()
    twin = loops.lightning_module()
    twin.load_state_dict(module.state_dict())
    callback = RewireCallback("rigl", density=0.2, every=2, until=100, seed=5)
    trainer = loops.lightning_trainer(
        tmp_path,
        callback,
        max_epochs=2,
        accumulate_grad_batches=4,
        gradient_clip_val=0.1,
        precision=precision,
    )
    batches = DataLoader(loops.samples(), loops.SIZE)
    torch.manual_seed(1)
    trainer.fit(module, batches)

    torch.manual_seed(1)
    rewire.sparsify(twin, density=0.2)
    [optimizer], [scheduler] = twin.configure_optimizers()
    method = methods.RigL(twin, optimizer, every=2, until=100, seed=5)
    for epoch in range(2):
        torch.empty((), dtype=torch.int64).random_()  # as a DataLoader does, when it begins
        for number, batch in enumerate(batches.dataset[i : i + 8] for i in range(0, 48, 8)):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
                loss = twin.training_step(batch, number)
            (loss / 4).backward()
            if number in (3, 5):
                nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
                optimizer.step()
                method.step()
                optimizer.zero_grad()
        method.end_epoch(last=epoch == 1)
        scheduler.step()
    assert callback.method is not None
    assert callback.method.stats() == method.stats()
    assert method.stats()["updates"] == 2
    for name, value in twin.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


CASES: list[tuple[str, dict[str, Any]]] = [
    ("rigl", {"every": 2, "until": 100}),
    ("set", {"every_epochs": 1}),
    ("gmp", {}),  # ends with fewer connections than it begins with
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_a_killed_training_goes_on_to_the_same_bits(
    tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    options = method, parameters
    first = loops.start(loops.train_with_lightning, whole, *options, 0)
    second = loops.start(loops.train_with_lightning, killed, *options, 8)  # within epoch 3 of 4
    loops.wait_for(killed / "paused", second)
    second.kill()
    second.join()
    assert len(list(killed.glob("*.ckpt"))) == 2
    again = loops.start(loops.train_with_lightning, killed, *options, 0)
    loops.finish(again)
    loops.finish(first)
    expected, found = (torch.load(folder / "end.pt") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_an_end_of_an_epoch_after_its_checkpoint_is_made_up_for(tmp_path: Path) -> None:
    """After a validation Lightning saves before callbacks hear of the end of the epoch."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def train(epochs: int, checkpoint: str | None) -> methods.Method:
        callback = RewireCallback("set", density=0.2, every_epochs=1, until_epochs=9)
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
        trainer = loops.lightning_trainer(
            tmp_path, callback, saver, max_epochs=epochs, enable_checkpointing=True
        )
        module, batches = loops.lightning_module(), loops.loader()
        trainer.fit(module, batches, DataLoader(loops.samples(), 8), ckpt_path=checkpoint)
        assert callback.method is not None
        return callback.method

    whole, again = train(4, None), train(4, str(tmp_path / "epoch=1.ckpt"))
    assert (again.epochs, again.steps) == (whole.epochs, whole.steps) == (4, 24)
    assert again.updates == whole.updates == 3


@pytest.mark.slow
def test_ranks_of_ddp_have_one_topology(tmp_path: Path) -> None:
    (one, updates), (other, _) = loops.train_on_two_ranks(tmp_path, "lightning")
    assert updates == 4
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_budget_is_in_the_logs_and_the_progress_bar(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    trainer = loops.lightning_trainer(
        tmp_path,
        RewireCallback("set", density=0.25),
        max_epochs=1,
        logger=logger,
        log_every_n_steps=1,
    )
    trainer.fit(loops.lightning_module(), loops.loader())
    k = round(0.25 * (20 * 40 + 40 * 4))
    assert trainer.progress_bar_metrics["connections"] == k
    assert trainer.logged_metrics["connections"] == k
    assert float(trainer.logged_metrics["density"]) == pytest.approx(0.25)
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        assert [float(row["connections"]) for row in csv.DictReader(file)] == [k] * loops.BATCHES


def test_a_residual_network_of_images_trains_at_its_budget(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = loops.lightning_module(lambda: images.resnet18((3, 16, 16), 4))
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 4)
    callback = RewireCallback("deep-r", density=0.02, exclude="*.conv1")
    trainer = loops.lightning_trainer(tmp_path, callback, max_steps=2)
    trainer.fit(module, DataLoader(data, 4))
    weights = dict(rewire.sparse_weights(module))
    assert weights
    m = sum(w.shape.numel() for w in weights.values())
    assert sum(w.connections for w in weights.values()) == round(0.02 * m)


def test_a_second_fit_begins_with_a_new_method(tmp_path: Path) -> None:
    module, callback = loops.lightning_module(), RewireCallback("set", density=0.2)
    loops.lightning_trainer(tmp_path, callback, max_epochs=1).fit(module, loops.loader())
    first = callback.method
    loops.lightning_trainer(tmp_path, callback, max_epochs=1).fit(module, loops.loader())
    assert callback.method is not first
    assert callback.method is not None
    assert callback.method.epochs == 1


class WithPenalty(methods.SET):
    """A method of somebody's that adds to the loss."""

    def penalty(self) -> torch.Tensor:
        return sum(pool.weight.values.abs().sum() for pool in self.pools)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "sett", "density": 0.1}, "unknown method 'sett'.*did you mean 'set'"),
        ({"method": 3, "density": 0.1}, "method must be a name or a function, not 3"),
        ({"method": "halo", "density": 0.1}, "starts from a dense model"),
        ({"method": "set", "density": 0.1, "connections": 9}, "not both"),
        ({"method": "set"}, "no sparse layers: give density= or connections="),
        ({"method": "set", "density": 0.1, "only": "abc"}, "only= and exclude= leave none"),
        ({"method": "set", "density": 0.1, "evry": 3}, "no parameter 'evry'.*'every'"),
        ({"method": WithPenalty, "density": 0.1}, "adds a term to the loss"),
    ],
)
def test_what_it_refuses(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):  # noqa: PT012
        callback = RewireCallback(**arguments)
        trainer = loops.lightning_trainer(tmp_path, callback, max_epochs=1)
        trainer.fit(loops.lightning_module(), loops.loader())


def test_a_budget_for_a_sparse_model_is_refused(tmp_path: Path) -> None:
    module = loops.lightning_module()
    rewire.sparsify(module, density=0.1)
    trainer = loops.lightning_trainer(tmp_path, RewireCallback("set", density=0.1), max_epochs=1)
    with pytest.raises(ValueError, match="has sparse layers already"):
        trainer.fit(module, loops.loader())


@pytest.mark.parametrize(
    ("library", "missing", "words"),
    [
        ("lightning", "lightning", r"pip install 'torch-rewire\[lightning\]'"),
        ("transformers", "transformers", r"pip install 'torch-rewire\[transformers\]'"),
        ("transformers", "accelerate", r"pip install 'torch-rewire\[transformers\]'"),
    ],
)
def test_a_missing_extra_is_reported_with_the_line_to_type(
    library: str, missing: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"rewire.{library}", raising=False)
    with pytest.raises(ImportError, match=words):
        importlib.import_module(f"rewire.{library}")

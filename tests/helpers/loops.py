"""Trainings by Lightning and by the Trainer of transformers, in processes that can be killed.

Imported by children that are forked from a server, which has imported the libraries once.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCHES, SIZE = 6, 8  # of an epoch


def start(function: Callable[..., None], *args: Any) -> Any:
    """Call ``function`` in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_installed("lightning", "transformers")])
    process = context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def _installed(*names: str) -> list[str]:
    found = [name for name in names if importlib.util.find_spec(name)]
    return [*found, *(f"rewire.{name}" for name in found)]


def wait_for(path: Path, process: Any) -> None:
    """Wait until the process has written the file."""
    end = time.monotonic() + 120
    while not path.exists():
        assert process.is_alive(), f"ended with {process.exitcode} before it wrote {path.name}"
        assert time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(0.01)


def finish(process: Any) -> None:
    """Wait for the end of a process, which must be a good one."""
    process.join(120)
    assert process.exitcode == 0, process.exitcode


def quietly() -> None:
    """What a training of the tests begins with."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


# --- Lightning ------------------------------------------------------------------------------------


def samples() -> TensorDataset:
    """Samples of two classes, (20,) each."""
    x = torch.randn(BATCHES * SIZE, 20, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x[:, 0] > 0).long())


def network() -> nn.Sequential:
    """A perceptron with dropout."""
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Dropout(0.1), nn.Linear(40, 4))


def lightning_module(make: Callable[[], nn.Module] = network) -> Any:
    """A module of Lightning that classifies samples; its rate falls after each epoch."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.net(batch[0])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), 1e-2)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    return Module()


def lightning_trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    """A trainer without output."""
    import lightning

    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_model_summary=False,
        **{"logger": False, "enable_progress_bar": False, "enable_checkpointing": False} | options,
    )


def loader() -> Any:
    """The samples in a new order in each epoch."""
    return DataLoader(samples(), SIZE, shuffle=True)


def train_with_lightning(folder: Path, method: str, parameters: dict[str, Any], pause: int) -> None:
    """Train for four epochs with a checkpoint after each, or go on from the last one there is.

    pause: number of the optimizer step after which the process waits to be killed; 0: never.
    """
    quietly()
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from rewire.lightning import RewireCallback

    class Pause(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if pause and trainer.global_step == pause:
                (folder / "paused").touch()
                time.sleep(300)

    torch.manual_seed(3)
    module = lightning_module()
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    checkpoint = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = lightning_trainer(
        folder,
        RewireCallback(method, density=0.2, **parameters),
        checkpoint,
        Pause(),
        max_epochs=4,
        enable_checkpointing=True,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
    )
    trainer.fit(module, loader(), ckpt_path=found[-1] if found else None)
    torch.save(module.state_dict(), folder / "end.pt")


# --- transformers ---------------------------------------------------------------------------------


def transformer(kind: str) -> nn.Module:
    """A small network of transformers with random weights."""
    import transformers as hf

    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    if kind == "bert":
        return hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_labels=2))
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
    assert kind == "gpt2"
    config = hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    return hf.GPT2LMHeadModel(config)


def texts(kind: str) -> list[dict[str, Any]]:
    """Random tokens, and a class that the first one tells, or the tokens themselves."""
    ids = torch.randint(0, 50, (48, 10), generator=torch.Generator().manual_seed(0))
    return [
        {"input_ids": row, "labels": (row[0] > 25).long() if kind == "bert" else row} for row in ids
    ]


#: What stays dense: embeddings' partners, and the small layer that gives the classes.
HEADS = ["lm_head", "classifier"]


def hf_trainer(
    folder: Path, kind: str, *callbacks: Any, model: nn.Module | None = None, **options: Any
) -> Any:
    """A Trainer for a small network: ``model``, or one with new values."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    hf.set_seed(0)
    args = hf.TrainingArguments(
        str(folder),
        **{
            "num_train_epochs": 3,
            "per_device_train_batch_size": SIZE,
            "gradient_accumulation_steps": 2,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "disable_tqdm": True,
        }
        | options,
    )
    model = transformer(kind) if model is None else model
    return hf.Trainer(model, args, train_dataset=texts(kind), callbacks=list(callbacks))


def train_with_transformers(
    folder: Path, kind: str, method: str, parameters: dict[str, Any], pause: int
) -> None:
    """The same with transformers: nine steps in three epochs, a checkpoint after every second."""
    quietly()
    import transformers as hf

    from rewire.transformers import RewireCallback

    class Pause(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == pause:
                (folder / "paused").touch()
                time.sleep(300)

    callback = RewireCallback(method, density=0.2, exclude=HEADS, **parameters)
    trainer = hf_trainer(
        folder, kind, callback, Pause(), save_strategy="steps", save_steps=2, bf16=True
    )
    trainer.train(resume_from_checkpoint=bool(list(folder.glob("checkpoint-*"))))
    torch.save(trainer.model.state_dict(), folder / "end.pt")


# --- two processes --------------------------------------------------------------------------------


def two_ranks(rank: int, port: int, folder: Path, library: str) -> None:
    """One of two ranks of DDP; what it ends with is in ``RANK.pt``."""
    quietly()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
        "GROUP_RANK": "0",
    }
    torch.manual_seed(rank)  # ranks that start differently
    if library == "lightning":
        from rewire.lightning import RewireCallback

        callback: Any = RewireCallback("rigl", density=0.2, every=1, until=100)
        model = lightning_module()
        trainer = lightning_trainer(
            folder, callback, max_epochs=2, devices=2, strategy="ddp", accumulate_grad_batches=2
        )
        trainer.fit(model, loader())
    else:
        from rewire.transformers import RewireCallback as ForTransformers

        callback = ForTransformers("rigl", density=0.2, exclude=HEADS, every=1, until=100)
        trainer = hf_trainer(folder, "bert", callback)
        trainer.train()
        model = trainer.model
    torch.save((model.state_dict(), callback.method.stats()["updates"]), folder / f"{rank}.pt")


def train_on_two_ranks(folder: Path, library: str) -> list[Any]:
    """What `two_ranks` leaves on each of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(two_ranks, rank, port, folder, library) for rank in range(2)]
    for rank in ranks:
        finish(rank)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]

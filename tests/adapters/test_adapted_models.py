"""Adapted models in the loops of Lightning and of the Trainer of transformers: differences are
rewired, the base stays, and checkpoints resume to the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loops
import rewire
from rewire.nn.layers.adapted import AdaptedLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def adapted(kind: str) -> tuple[Any, rewire.Adapter]:
    """A network of transformers with differences, at values that each call gives again."""
    from rewire.transformers import conv1d_to_linear

    torch.manual_seed(5)
    model = conv1d_to_linear(loops.transformer(kind))
    generator = torch.Generator().manual_seed(0)
    train = ["classifier.*", "*LayerNorm.*"] if kind == "bert" else []
    exclude = ["classifier"]
    return model, rewire.adapt(
        model, density=0.05, exclude=exclude, train=train, generator=generator
    )


def hugging_face(folder: Path, kind: str, **options: Any) -> tuple[Any, Any, rewire.Adapter, Any]:
    from rewire.transformers import RewireCallback

    model, adapter = adapted(kind)
    callback = RewireCallback("rigl", every=2, until=100, seed=3)
    trainer = loops.hf_trainer(folder, kind, callback, model=model, bf16=True, **options)
    return trainer, model, adapter, callback


def test_the_trainer_of_transformers_trains_differences(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra transformers")
    pytest.importorskip("accelerate", reason="needs the extra transformers")
    for kind, layers in (("bert", 13), ("gpt2", 9)):
        trainer, model, adapter, callback = hugging_face(tmp_path, kind)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        connections = adapter.connections
        trainer.train()
        assert len(adapter.differences) == layers
        assert callback.method.stats()["updates"] == 4
        assert adapter.connections == connections
        assert all(bool(pool.values.any()) for pool in adapter.differences.values())
        assert all(torch.equal(model.get_parameter(n), value) for n, value in before.items())
        assert all(line["connections"] == connections for line in trainer.state.log_history[:-1])
        if kind == "gpt2":  # its head shares the weight of the embedding
            assert type(model.lm_head) is AdaptedLinear
            assert model.lm_head.weight is model.transformer.wte.weight
        adapter.save(tmp_path / "a.safetensors")
        other, fresh = adapted(kind)
        fresh.load(tmp_path / "a.safetensors")
        state = other.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        if kind == "bert":
            assert type(adapter.merge().bert.pooler.dense) is nn.Linear


def test_a_checkpoint_of_the_trainer_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra transformers")
    pytest.importorskip("accelerate", reason="needs the extra transformers")
    saving = {"save_strategy": "steps", "save_steps": 5}
    trainer, model, _, _ = hugging_face(tmp_path, "bert", **saving)
    trainer.train()
    again, other, _, callback = hugging_face(tmp_path, "bert", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert callback.method.stats()["updates"] == 4
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_lightning_trains_differences_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="needs the extra lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from rewire.lightning import RewireCallback

    def fit(epochs: int, checkpoint: str | None) -> Any:
        torch.manual_seed(2)
        module = loops.lightning_module()
        rewire.adapt(module.net, density=0.2, train="3.bias")
        callback = RewireCallback("set", every_epochs=1, until_epochs=9, seed=1)
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = loops.lightning_trainer(
            tmp_path,
            callback,
            keep,
            max_epochs=epochs,
            enable_checkpointing=True,
            accumulate_grad_batches=2,
            precision="bf16-mixed",
        )
        trainer.fit(module, loops.loader(), ckpt_path=checkpoint)
        assert callback.method is not None
        return module

    whole = fit(4, None)
    again = fit(4, str(tmp_path / "epoch=1.ckpt"))
    assert isinstance(whole.net[0], AdaptedLinear)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name

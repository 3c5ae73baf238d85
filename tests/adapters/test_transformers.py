"""The callback for the Trainer of transformers, on a BERT, a Llama and a GPT-2 with random
weights.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loops
import rewire
from rewire import methods
from rewire.nn import SparseLinear

hf = pytest.importorskip("transformers", reason="needs the extra transformers")
pytest.importorskip("accelerate", reason="needs the extra transformers")

from rewire.transformers import RewireCallback, conv1d_to_linear  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_it_keeps_the_budget_and_rewires(tmp_path: Path, kind: str) -> None:
    callback = RewireCallback("set", density=0.2, exclude=loops.HEADS, every=2, until=100)
    trainer = loops.hf_trainer(tmp_path, kind, callback)
    trainer.train()
    weights = dict(rewire.sparse_weights(trainer.model))
    assert len(weights) == {"bert": 13, "llama": 14, "gpt2": 8}[kind]
    m = sum(weight.shape.numel() for weight in weights.values())
    assert sum(weight.connections for weight in weights.values()) == round(0.2 * m)
    assert callback.method is not None
    assert callback.method.stats()["steps"] == 9  # of 18 batches
    assert callback.method.stats()["updates"] == 4
    assert callback.method.epochs == 3


def test_it_does_what_a_loop_with_accelerate_does(tmp_path: Path) -> None:
    """With accumulated gradients, clipping and bfloat16; it also shows that methods work with what
    accelerate makes of an optimizer.
    """
    from accelerate import Accelerator

    callback = RewireCallback("rigl", density=0.2, exclude=loops.HEADS, every=2, until=100, seed=5)
    options: dict[str, Any] = {
        "bf16": True,
        "max_grad_norm": 0.1,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 2,
    }
    trainer = loops.hf_trainer(tmp_path, "llama", callback, **options)
    twin = copy.deepcopy(trainer.model)
    trainer.train()

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    twin, optimizer = accelerator.prepare(twin, optimizer)
    method = methods.RigL(accelerator.unwrap_model(twin), optimizer, every=2, until=100, seed=5)
    rows = torch.stack([text["input_ids"] for text in loops.texts("llama")])
    for epoch in range(2):
        for number, batch in enumerate(rows.split(loops.SIZE)):
            accelerator.backward(twin(input_ids=batch, labels=batch).loss / 2)
            if number % 2:
                accelerator.clip_grad_norm_(twin.parameters(), 0.1)
                optimizer.step()
                method.step()
                optimizer.zero_grad()
        method.end_epoch(last=epoch == 1)
    assert callback.method is not None
    assert callback.method.stats()["updates"] == method.stats()["updates"] == 3
    there = trainer.model.state_dict()
    for name, value in accelerator.unwrap_model(twin).state_dict().items():
        assert torch.allclose(value.float(), there[name].float(), rtol=1e-4, atol=1e-6), name


CASES: list[tuple[str, str, dict[str, Any], int]] = [
    ("bert", "rigl", {"every": 2, "until": 100}, 5),  # in the middle of an epoch
    ("gpt2", "set", {"every_epochs": 1}, 7),
    ("llama", "gmp", {"every": 1}, 9),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method", "parameters", "pause"), CASES)
def test_a_killed_training_goes_on_to_the_same_bits(
    tmp_path: Path, kind: str, method: str, parameters: dict[str, Any], pause: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    options = kind, method, parameters
    first = loops.start(loops.train_with_transformers, whole, *options, 0)
    second = loops.start(loops.train_with_transformers, killed, *options, pause)
    loops.wait_for(killed / "paused", second)
    second.kill()
    second.join()
    steps = sorted(int(path.name.split("-")[1]) for path in killed.glob("checkpoint-*"))
    assert steps == list(range(2, pause, 2))
    again = loops.start(loops.train_with_transformers, killed, *options, 0)
    loops.finish(again)
    loops.finish(first)
    expected, found = (torch.load(folder / "end.pt") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.slow
def test_ranks_of_ddp_have_one_topology(tmp_path: Path) -> None:
    (one, updates), (other, _) = loops.train_on_two_ranks(tmp_path, "transformers")
    assert updates > 0
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_budget_is_in_the_logs(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []

    class Tracker(hf.TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            heard.append(dict(logs))

    callback = RewireCallback("set", density=0.2, exclude=loops.HEADS)
    trainer = loops.hf_trainer(tmp_path, "bert", callback, Tracker(), max_steps=2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    assert all(line["density"] == pytest.approx(0.2, abs=1e-3) for line in lines)
    assert (
        heard[0]["connections"]
        == lines[0]["connections"]
        == sum(weight.connections for _, weight in rewire.sparse_weights(trainer.model))
    )


def test_a_checkpoint_restores_callbacks_too(tmp_path: Path) -> None:
    """With restore_callback_states_from_checkpoint, the Trainer makes new callbacks."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    callback = RewireCallback("set", density=0.2, exclude=loops.HEADS, every=2, until=100)
    loops.hf_trainer(tmp_path, "bert", callback, **options).train()
    again = RewireCallback("set", density=0.2, exclude=loops.HEADS, every=2, until=100)
    trainer = loops.hf_trainer(
        tmp_path, "bert", again, restore_callback_states_from_checkpoint=True, **options
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    [restored] = [c for c in trainer.callback_handler.callbacks if isinstance(c, RewireCallback)]
    assert callback.method is not None
    assert restored.method is not None
    assert restored.method.stats() == callback.method.stats()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["RewireCallback"]["args"]["method"] == "set"


def test_what_is_tied_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shares its weight with .*: exclude both"):
        loops.hf_trainer(tmp_path, "gpt2", RewireCallback("set", density=0.2))


def test_gpt2_computes_the_same_with_linear_layers() -> None:
    model = loops.transformer("gpt2").eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids).logits
        assert conv1d_to_linear(model) is model
        after = model(ids).logits
    assert torch.allclose(before, after, atol=1e-6)
    block = model.transformer.h[0]
    assert type(block.attn.c_attn) is nn.Linear
    rewire.sparsify(model, density=0.3, exclude="lm_head")
    assert type(block.mlp.c_fc) is SparseLinear

"""A callback for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import base64
import math
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from rewire.adapters.conv1d import conv1d_to_linear
from rewire.adapters.loops import LoopCallback
from rewire.storage.nested import pack, unpack

__all__ = ["RewireCallback"]


class RewireCallback(LoopCallback, TrainerCallback, ExportableState):  # type: ignore[misc]
    __doc__ = LoopCallback.__doc__

    saved = ""  # the method's state in the checkpoint that this training goes on from

    def state(self) -> dict[str, Any]:
        """The method's state for a checkpoint; as text, because a checkpoint holds JSON only."""
        state = b"" if self.method is None else pack(self.saved_state())
        return {"args": self.as_json(), "attributes": {"saved": base64.b64encode(state).decode()}}

    def on_init_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Make the model sparse; the Trainer makes optimizers and loads checkpoints after this."""
        if self.makes_sparse:
            conv1d_to_linear(model)
        self.make_sparse(model)

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **given: Any) -> None:
        """Make the method. Model and optimizer are as they were in the checkpoint, if any."""
        optimizer = given["optimizer"]  # which accelerate has wrapped
        optimizer = getattr(optimizer, "optimizer", optimizer)
        saved = None
        if state.global_step and (kept := state.stateful_callbacks.get(type(self).__name__)):
            content = base64.b64decode(kept["attributes"]["saved"])
            saved = unpack(content, "the state of RewireCallback in the checkpoint")
        epochs = math.ceil(state.num_train_epochs)
        length = {"total_steps": state.max_steps, "total_epochs": epochs}
        self.begin(given["model"], optimizer, lambda: length, 0, saved)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Let the method act: before the rate changes, after a step of all accumulated batches."""
        if self.method is not None:
            self.method.step()

    def on_epoch_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """Tell the method of the end of an epoch that was saved before it ended."""
        self.end_epochs(math.floor(state.epoch))

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell the method that the epoch has ended."""
        last = control.should_training_stop or state.global_step >= state.max_steps
        self.end_epochs(math.ceil(state.epoch), last=last)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any
    ) -> None:
        """Add the budget to what is logged of training; the progress bar shows it."""
        if "loss" in logs:
            logs.update(self.figures())
            state.log_history[-1].update(self.figures())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the method off the model."""
        if self.method is not None:
            self.method.finalize()

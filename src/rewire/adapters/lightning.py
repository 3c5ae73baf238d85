"""A callback for Lightning's Trainer."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from rewire.adapters.loops import LoopCallback

__all__ = ["RewireCallback"]


class RewireCallback(LoopCallback, Callback):  # type: ignore[misc]
    __doc__ = LoopCallback.__doc__

    _saved: dict[str, Any] | None = None  # in the checkpoint that this training goes on from

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the model sparse; Lightning makes optimizers and loads checkpoints after this."""
        self._saved = None
        self.make_sparse(pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is a method."""
        self._saved = state_dict

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the method, and torch's random numbers."""
        if self.method is None:
            return {}
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return self.saved_state() | {"random": [torch.get_rng_state(), *cuda]}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the method. Optimizers have no state yet."""
        saved, self._saved = self._saved, None
        epoch = trainer.current_epoch
        self.begin(pl_module, trainer.optimizers, lambda: _length(trainer), epoch, saved)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._after_step)
        if saved:
            torch.set_rng_state(saved["random"][0].cpu())
            if cuda := [state.cpu() for state in saved["random"][1:]]:
                torch.cuda.set_rng_state_all(cuda)
            # If the order of the samples was drawn already, by configure_optimizers, draw it again.
            iter(getattr(trainer.fit_loop, "_data_fetcher", None) or ())

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.method is not None:
            self.method.step()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the budget, and show it in the progress bar."""
        for name, value in self.figures().items():
            pl_module.log(name, value, prog_bar=name == "connections")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the method of the end of an epoch that was saved before it ended."""
        self.end_epochs(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the method that the epoch has ended."""
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
        self.end_epochs(epoch, last=last)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the method off the model."""
        if self.method is not None:
            self.method.finalize()


def _length(trainer: Trainer) -> dict[str, int]:
    steps, epochs = trainer.estimated_stepping_batches, trainer.max_epochs or -1
    known = (("total_epochs", epochs), ("total_steps", steps))
    return {name: int(n) for name, n in known if 0 < n < math.inf}

"""The loop behind `rewire train`: a function of options and data, whatever interrupts it."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewire import methods
from rewire.app import memory
from rewire.app.data import Dataset
from rewire.app.errors import StoppedError, TrainError
from rewire.app.run_files import COMMIT, EMPTY
from rewire.app.train import baselines, before_after, checkpoint, rates
from rewire.app.train.checkpoint import Checkpoint
from rewire.app.train.config import TrainConfig
from rewire.app.train.metrics import EpochRecord, evaluate, versions
from rewire.app.train.observer import Observer, Progress
from rewire.app.train.parts import Parts, assemble
from rewire.app.train.ranks import Ranks
from rewire.app.train.run_dir import INPUTS, METRICS, MODEL, RunDir
from rewire.app.train.sums import Sums
from rewire.nn.surgery import load_resized
from rewire.storage import files, reading
from rewire.storage import tensors as tensor_file

PROGRESS_SECONDS = 0.2


class Trainer:
    """One run: everything it is made of, its state, and the way to save and restore it."""

    def __init__(self, parts: Parts, run_dir: RunDir, ranks: Ranks | None = None) -> None:
        self.parts, self.run_dir, self.ranks = parts, run_dir, ranks or Ranks()
        self.config, self.info = parts.config, parts.info
        self.batches, self.held_out = parts.batches, parts.held_out
        self.model, self.optimizer, self.method = parts.model, parts.optimizer, parts.method
        # The base class's penalty is 0: adding it would cost two operations a step for nothing.
        self.has_penalty = type(self.method).penalty is not methods.Method.penalty
        self.task, self.variance = parts.task, parts.task.variance(self.batches.y)
        # float16 loses small gradients, so the loss is scaled; of the others this changes nothing
        self.scaler = torch.amp.GradScaler("cpu", enabled=self.config.precision == "float16")
        # epochs completed, batches of this one, steps in all
        self.epoch, self.batch, self.step = 0, 0, 0
        self.sums = Sums()  # of this epoch so far
        self.before = parts.counts()  # dropped and grown when this epoch began
        self.metrics = EMPTY
        self.seconds_before, self.clock = 0.0, time.perf_counter()

    # --- state ------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Time spent training, over all the pieces of an interrupted run."""
        return self.seconds_before + time.perf_counter() - self.clock

    def save(self) -> None:
        """Commit a checkpoint of this moment."""
        sums = self.sums.over(self.ranks)
        if not self.ranks.first:
            return
        state = {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "batch": self.batch,
            **sums.state(),
            "scaler": self.scaler.state_dict(),
            "before": self.before,
            "torch_random": torch.get_rng_state(),
        }
        checkpoint.save(
            self.run_dir.path,
            Checkpoint(
                epoch=self.epoch,
                step=self.step,
                config_sha256=self.config.sha256(),
                metrics=self.metrics,
                seconds=self.seconds,
                info=self.info,
                state=state,
            ),
        )

    def begin(self) -> None:
        """Commit the state of a new run before its first step."""
        if self.ranks.first:
            self.run_dir.cut_metrics(EMPTY)
        self.save()

    def restore(self) -> None:
        """Go back to the last checkpoint; what was written after it is taken back."""
        folder = self.run_dir.path
        if not checkpoint.exists(folder):  # killed before the first one
            if (folder / METRICS).exists() and (folder / METRICS).stat().st_size:
                raise TrainError(
                    f"{folder / COMMIT} is missing, and {folder / METRICS} says that the run had "
                    "begun; restore it, "
                    "or start the run again with --overwrite"
                )
            if self.ranks.first:
                files.remove_unfinished(folder)
                checkpoint.remove_orphans(folder, keep=None)
            self.begin()
            return
        saved = self.run_dir.read_checkpoint(self.config)
        if saved.info.get("data_sha256") != self.info["data_sha256"]:
            raise TrainError(
                f"--resume: the data are not those that the run in {folder} began with; restore "
                "them, or start the run again with --overwrite"
            )
        state = saved.state
        try:
            if self.parts.dense:  # it may have fewer units by now
                load_resized(self.model, state["model"])
            else:
                self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.method.load_state_dict(state["method"])
            self.batch, self.before = int(state["batch"]), state["before"]
            self.sums.restore(state)
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["torch_random"])
        except Exception as error:  # a file can hold anything
            if memory.is_exhausted(error):
                raise
            reason = reading.brief(error) or type(error).__name__
            raise TrainError(
                f"the checkpoint in {folder} does not fit its options: {reason}"
            ) from None
        self.epoch, self.step = saved.epoch, saved.step
        self.metrics = saved.metrics
        if self.ranks.first:  # Everything fits: only now may anything be removed.
            files.remove_unfinished(folder)
            checkpoint.remove_orphans(folder, keep=checkpoint.committed_file(folder))
            self.run_dir.cut_metrics(self.metrics)
        else:  # the sums so far count once
            self.sums.clear()
        self.seconds_before, self.clock = saved.seconds, time.perf_counter()

    # --- training ---------------------------------------------------------------------------------

    def train(self, observer: Observer, stop: Callable[[], int]) -> None:
        """Train to the end. `stop` gives the number of a signal that asks to stop, else 0."""
        observer.started(self.info, self.config.epochs, len(self.batches), self.step)
        while self.epoch < self.config.epochs:
            self._train_epoch(observer, stop)
            self._end_epoch(observer)
            if signal := self.ranks.largest(stop()):
                raise StoppedError(signal, self.step)

    def _train_epoch(self, observer: Observer, stop: Callable[[], int]) -> None:
        config, model, optimizer, method = self.config, self.model, self.optimizer, self.method
        forward = self.parts.forward
        batches = len(self.batches)
        task, scaler = self.task, self.scaler
        self._set_lr()
        each = rates.interval(config, batches)
        due = time.perf_counter() + PROGRESS_SECONDS
        model.train()
        for batch in self.batches.epoch(self.epoch, self.batch):
            if self.step % each == 0:
                self._set_lr()
            x, y, count, share = self._own(*batch)
            if config.precision == "float32":
                output = forward(x)
            else:
                with torch.autocast("cpu", getattr(torch, config.precision)):
                    output = forward(x)
                output = output.float()
            loss = task.loss(output, y) if count else 0.0 * output.sum()
            optimizer.zero_grad()
            # DDP takes the mean over ranks, and their shares of a batch may differ.
            whole = loss if share == 1 else share * loss
            if self.has_penalty:
                whole = whole + method.penalty()
            scaler.scale(whole).backward()
            if config.clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            scaler.step(optimizer)
            scaler.update()
            method.step()
            correct = task.correct(output.detach(), y) if count else None
            self.sums.add(loss.detach(), count, correct)
            self.batch += 1
            self.step += 1
            if self.batch < batches:  # after the last batch, the end of the epoch does this
                if signal := self.ranks.largest(stop()):
                    self.save()
                    raise StoppedError(signal, self.step)
                if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self.save()
            if time.perf_counter() >= due:
                observer.progress(self._progress())
                due = time.perf_counter() + PROGRESS_SECONDS

    def _own(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int, float]:
        """This rank's part of a batch, the labels in it, and what its mean loss counts by."""
        own_x, own_y = self.ranks.part(x, y)
        count = self.task.count(own_y)
        if not self.ranks.several:
            return own_x, own_y, count, 1.0
        share = count * self.ranks.count / max(self.task.count(y), 1)
        if not len(own_y):  # DDP needs a pass all the same
            return x[:1], y[:1], 0, 0.0
        return own_x, own_y, count, share

    def _set_lr(self) -> None:
        """Set this step's rate."""
        lr = rates.rate_at(self.config, len(self.batches), self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _train_score(self) -> float:
        """Of the steps of this epoch so far."""
        sums = self.sums
        count = max(sums.count, 1)
        return self.task.scored(sums.mean_loss, int(sums.correct), count, self.variance)

    def _progress(self) -> Progress:
        connections = sum(self.parts.connections().values())
        grown = sum(self.parts.counts()["grown"].values()) - sum(self.before["grown"].values())
        return Progress(
            epoch=self.epoch + 1,
            batch=self.batch,
            loss=self.sums.mean_loss,
            accuracy=self._train_score(),
            connections=connections,
            turnover=grown / max(connections, 1),
        )

    def _end_epoch(self, observer: Observer) -> None:
        """Score, let the method act, write the line, commit the checkpoint."""
        config, task = self.config, self.task
        self.sums = self.sums.over(self.ranks)
        train_loss = self.sums.mean_loss
        if not math.isfinite(train_loss):
            raise TrainError(self._diverged(f"the loss is {train_loss}"))
        held_x, held_y = self.held_out

        def scored(model: nn.Module) -> tuple[float, float]:
            found: tuple[float, float] = self.ranks.of_first(evaluate(model, held_x, held_y, task))
            return found

        def score(model: nn.Module) -> float:
            return scored(model)[1]

        scores = scored(self.model) if len(held_y) else None

        lr = float(self.optimizer.param_groups[0]["lr"])
        last = self.epoch + 1 == config.epochs
        found = sum(self.parts.connections().values())
        try:
            self.method.end_epoch(score if scores else None, last=last)
        except ValueError as error:  # a method that decides by a score, without a validation split
            raise TrainError(f"--method {config.method}: {error}") from None
        counts = self.parts.counts()
        connections = list(self.parts.connections().values())
        if scores and sum(connections) != found:  # the method removed some: score what is left
            scores = scored(self.model)
        if scores and not math.isfinite(scores[0]):
            raise TrainError(self._diverged(f"the loss on the validation samples is {scores[0]}"))
        # A method that starts dense may go back to an earlier, larger network: nothing was dropped
        # then.
        change = {
            kind: [max(0, now - self.before[kind][name]) for name, now in counts[kind].items()]
            for kind in counts
        }
        of_task: dict[str, Any] = {
            "train_accuracy": None,
            "validation_accuracy": None,
            f"train_{task.score}": self._train_score(),
            f"validation_{task.score}": scores[1] if scores else None,
        }
        self.epoch, self.batch = self.epoch + 1, 0
        record = EpochRecord(
            epoch=self.epoch,
            step=self.step,
            lr=lr,
            train_loss=train_loss,
            validation_loss=scores[0] if scores else None,
            connections=connections,
            dropped=change["dropped"],
            grown=change["grown"],
            turnover=[
                grown / max(k, 1) for grown, k in zip(change["grown"], connections, strict=True)
            ],
            seconds=self.seconds,
            units=self.parts.units(),
            **of_task,
        )
        self.sums.clear()
        self.before = counts
        if self.ranks.first:
            self.metrics = self.run_dir.append_metrics(record.to_line())
        self.save()
        observer.epoch_ended(record)

    def _diverged(self, what: str) -> str:
        epoch = min(self.epoch + 1, self.config.epochs)
        return (
            f"training diverged in epoch {epoch}: {what}; try a smaller --lr (it is "
            f"{self.config.lr}); "
            f"the checkpoint of epoch {self.epoch} is whole"
        )

    # --- the end ----------------------------------------------------------------------------------

    def finish(self, observer: Observer | None = None) -> dict[str, Any]:
        """Score the test set, once, and write the model and then the result."""
        with warnings.catch_warnings(record=True) as noticed:
            warnings.simplefilter("always")
            model = self.method.finalize()
        if not self.ranks.first:
            return {}
        for warning in noticed:  # as a line of their own, for whoever looks at the run
            print(f"warning: {' '.join(str(warning.message).split())}", file=sys.stderr)
        loss, score = evaluate(model, *self.parts.data.test, self.task)
        if not math.isfinite(loss):
            raise TrainError(self._diverged(f"the loss on the test set is {loss}"))
        state = model.state_dict()
        written = {MODEL: tensor_file.write(self.run_dir.path / MODEL, state)}
        if scaled := self.parts.data.tensors():
            written[INPUTS] = tensor_file.write(self.run_dir.path / INPUTS, scaled)
        connections, possible = sum(self.parts.left(model).values()), self.parts.whole
        result = {
            f"test_{self.task.score}": score,
            "test_loss": loss,
            "connections": connections,
            "possible_connections": possible,
            "density": connections / possible,
            "seconds": self.seconds,
            "epochs": self.epoch,
            "steps": self.step,
            "seed": self.config.seed,
            "config_sha256": self.config.sha256(),
            "versions": versions(),
            "info": self.info,
            **self._comparison(model, tensor_file.size(state)),
        }
        self.run_dir.write_result(result, written)
        (observer or Observer()).finished(model, result)
        return result

    def _comparison(self, model: nn.Module, file_bytes: int) -> dict[str, Any]:
        """Sizes and time of the network before and after; nothing for a method that keeps what it
        was given.

        Before is the dense network where the start was one, or was so nearly that a dense one is no
        larger: stored with its positions, a connection takes three times the memory.
        """
        parts = self.parts
        if self.config.method in baselines.BASELINES:
            return {}
        if not parts.dense and list(parts.left(model).values()) == parts.starts_with:
            return {}
        dense = parts.dense or 3 * sum(parts.starts_with) >= sum(parts.possible)
        before = parts.start_model(dense=dense)
        x = parts.data.test[0]
        part = before_after.compare(before, model, x, file_bytes, stack=parts.network.is_stack)
        part["before"]["network"] = "dense" if dense else "start"
        return part


def _locked(
    run_dir: RunDir, ranks: Ranks, *, create: bool = False
) -> contextlib.AbstractContextManager[None]:
    """The folder's lock, which the rank that writes has."""
    return run_dir.lock(create=create) if ranks.first else contextlib.nullcontext()


def run(
    config: TrainConfig,
    dataset: Dataset,
    run_dir: RunDir,
    *,
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
    stop: Callable[[], int] = lambda: 0,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Train from the start or from the last checkpoint; returns the result.

    A folder that exists is locked from the first moment; a new one is made only after everything
    that can be refused has been built. Nothing in it is written or removed without its lock.
    """
    ranks = ranks or Ranks()
    with _locked(run_dir, ranks):
        if not resume and ranks.first:
            run_dir.check_free(overwrite=overwrite)
        state = None
        if resume and ranks.several and checkpoint.exists(run_dir.path):
            state = run_dir.read_checkpoint(config).state["model"]
        trainer = Trainer(assemble(config, dataset, ranks, state), run_dir, ranks)
        watcher = observer or Observer()
        watcher.made(trainer.parts, resume=resume)
        with _locked(run_dir, ranks, create=not resume):
            if resume:
                trainer.restore()
            else:
                if ranks.first:
                    run_dir.start(trainer.config, overwrite=overwrite)
                trainer.begin()
            ranks.wait()  # nobody may read what the first rank is still putting in order
            try:
                trainer.train(watcher, stop)
            except RuntimeError as error:
                if ranks.lost(error):
                    raise TrainError(
                        "another process of the run has ended; the last checkpoint is whole"
                    ) from None
                raise
            return trainer.finish(watcher)

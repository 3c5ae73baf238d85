"""A run on the terminal: a progress bar where there is one, else one plain line an epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from rewire.app.train.metrics import EpochRecord
from rewire.app.train.observer import Observer, Progress

#: How scores are called.
SCORES = {"accuracy": "accuracy", "r2": "R²"}


def shown_score(score: str, value: float) -> str:
    """A score with its name."""
    return f"{SCORES[score]} {value:.2%}" if score == "accuracy" else f"{SCORES[score]} {value:.4f}"


def heading(info: Mapping[str, Any]) -> str:
    """What is about to be trained, in one line."""
    layers, samples = info["layers"], info["samples"]
    sizes = info.get("model", "mlp")
    if sizes == "mlp":
        sizes = "-".join(
            str(size) for size in [layers[0]["inputs"], *(layer["outputs"] for layer in layers)]
        )
    connections = sum(layer["connections"] for layer in layers)
    possible = sum(layer["inputs"] * layer["outputs"] for layer in layers)
    budget = sum(layer.get("budget", layer["connections"]) for layer in layers)
    end = f" to end with {budget:,}" if budget < connections else ""
    return (
        f"{sizes}, {connections:,} of {possible:,} connections "
        f"({connections / possible:.2%}){end}; "
        f"{samples['train']:,} training, {samples['validation']:,} validation, "
        f"{samples['test']:,} test samples"
    )


def epoch_line(record: EpochRecord, epochs: int, *, dense: bool = False) -> str:
    """One epoch, in one line; of methods that start ``dense`` with units in place of turnover."""
    if record.validation_score is None:
        scores = f"train {shown_score(record.score, record.train_score)}"
    else:
        scores = f"validation {shown_score(record.score, record.validation_score)}"
    connections = sum(record.connections)
    if dense:
        change = f"units {'-'.join(map(str, record.units))}"
    else:
        change = f"turnover {sum(record.grown) / max(connections, 1):,.0%}"
    return (
        f"epoch {record.epoch:>{len(str(epochs))}}/{epochs}  train loss {record.train_loss:.4f}  "
        f"{scores}  "
        f"connections {connections:,}  {change}  {record.seconds:.1f} s"
    )


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """How the run ended."""
    info, loss = result["info"], result["test_loss"]
    score = info.get("score", "accuracy")
    shown = f"{result[f'test_{score}']:.2%}" if score == "accuracy" else f"{result['test_r2']:.4f}"
    text = f"loss {loss:.4f}"
    if info.get("signature", {}).get("tokens"):
        text += f", {loss / math.log(2):.3f} bits per token"
    lines = [
        f"{'test ' + SCORES[score]:<13}  {shown}  ({text})",
        f"connections    {result['connections']:,} of {result['possible_connections']:,} "
        f"(density {result['density']:.2%})",
    ]
    if (change := change_line(result)) is not None:
        lines.append(f"before, after  {change}")
    return [*lines, f"seconds        {result['seconds']:.1f}"]


def change_line(result: Mapping[str, Any]) -> str | None:
    """What became smaller, in one line; None for a run that kept its size."""
    if not {"before", "after", "inference"} <= result.keys():
        return None
    before, after, took = result["before"], result["after"], result["inference"]
    units = [
        "-".join(str(layer["active_units"]) for layer in part["layers"]) for part in (before, after)
    ]
    return (
        f"{before['bytes']:,} -> {after['bytes']:,} bytes, {before['multiply_adds']:,} -> "
        f"{after['multiply_adds']:,} multiply-adds, units {units[0]} -> {units[1]}, "
        f"{took['before_ms']:.3g} -> {took['after_ms']:.3g} ms for {took['samples']} samples "
        f"({took['speedup']:.2f} x as fast)"
    )


class Lines(Observer):
    """Plain lines, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console, self.epochs, self.dense, self.score = console, 0, False, "accuracy"

    def started(self, info: Mapping[str, Any], epochs: int, batches: int, done: int) -> None:
        """Print the heading."""
        self.epochs, self.dense = epochs, bool(info.get("starts_dense"))
        self.score = info.get("score", "accuracy")
        self.console.print(heading(info))
        if done:
            self.console.print(f"resumed after step {done:,} of {epochs * batches:,}")

    def epoch_ended(self, record: EpochRecord) -> None:
        """Print the epoch's line."""
        self.console.print(epoch_line(record, self.epochs, dense=self.dense))

    def _score(self, value: float) -> str:
        return f"acc {value:.1%}" if self.score == "accuracy" else f"R² {value:.3f}"

    def close(self) -> None:
        """Do nothing."""


class LiveBar(Lines):
    """A bar below the lines, with accuracy, loss, connections, turnover and time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.batches, self.task = 1, TaskID(0)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            expand=True,
        )

    def started(self, info: Mapping[str, Any], epochs: int, batches: int, done: int) -> None:
        """Print the heading and show the bar."""
        super().started(info, epochs, batches, done)
        self.batches = batches
        self.bar.start()
        self.task = self.bar.add_task("epoch 1", total=epochs * batches, completed=done)

    def progress(self, progress: Progress) -> None:
        """Move the bar."""
        text = (
            f"epoch {progress.epoch}  {self._score(progress.accuracy)}  loss {progress.loss:.3f}  "
            f"active {progress.connections:,}"
        )
        if not self.dense:
            text += f"  turnover {progress.turnover:,.0%}"
        done = (progress.epoch - 1) * self.batches + progress.batch
        self.bar.update(self.task, description=text, completed=done)

    def epoch_ended(self, record: EpochRecord) -> None:
        """Print the epoch's line and move the bar there: a short epoch never moved it."""
        super().epoch_ended(record)
        connections = sum(record.connections)
        turnover = sum(record.grown) / max(connections, 1)
        self.progress(
            Progress(
                record.epoch,
                self.batches,
                record.train_loss,
                record.train_score,
                connections,
                turnover,
            )
        )

    def close(self) -> None:
        """Take the bar away."""
        self.bar.stop()


class DownloadBar:
    """Downloads: a bar on a terminal, else a line for each file."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.tasks: dict[str, TaskID] = {}
        self.bar = Bar(console=console, transient=True) if console.is_terminal else None

    def __call__(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of file `name` are here."""
        if name not in self.tasks:
            if self.bar is None:
                self.console.print(f"downloading {name}, {total:,} bytes")
                self.tasks[name] = TaskID(len(self.tasks))
            else:
                self.bar.start()
                self.tasks[name] = self.bar.add_task(name, total=total)
        if self.bar is not None:
            self.bar.update(self.tasks[name], completed=done)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()

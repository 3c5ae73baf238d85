"""The learning rate of each step, a pure function of the options and the step."""

from __future__ import annotations

from rewire.app.train.fields import TrainConfig
from rewire.schedules import Cosine, Exponential, Step

__all__ = ["interval", "rate_at"]

# how often a falling rate changes in a run: each change costs the methods some work
RATE_STEPS = 1000


def interval(config: TrainConfig, batches: int) -> int:
    """Steps until the learning rate changes: an epoch, or a part of what changes all the time."""
    steady = config.schedule != "cosine" and not config.warmup
    return batches if steady else max(config.epochs * batches // RATE_STEPS, 1)


def rate_at(config: TrainConfig, batches: int, step: int) -> float:
    """The rate at ``step``, with ``batches`` steps in an epoch.

    In the warm-up it rises in a straight line to the full rate. A cosine begins after it; the
    milestones of "step" count from the start of the run.
    """
    assert config.lr is not None  # make_config filled it in
    each = interval(config, batches)
    step -= step % each
    warmup = round(config.warmup * batches)
    if step < warmup:
        return config.lr * min(step + each, warmup) / warmup
    if config.schedule == "cosine":
        return Cosine(config.lr, config.epochs * batches - warmup)(step - warmup)
    epoch = step // batches
    if config.schedule == "exponential":
        assert config.lr_decay is not None  # make_config refuses it without
        return Exponential(config.lr, config.lr_decay)(epoch)
    if config.schedule == "step":
        halves = config.epochs // 2, 3 * config.epochs // 4
        milestones = config.milestones or tuple(sorted({n for n in halves if n}))
        return Step(config.lr, config.lr_decay or 0.1, milestones)(epoch)
    return config.lr

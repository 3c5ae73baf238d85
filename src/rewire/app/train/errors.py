"""What stops a training run for a reason the user can see."""

from __future__ import annotations


class TrainError(Exception):
    """Something the user asked for cannot be done; the message is one line that says what can."""


class StoppedError(Exception):
    """The run was asked to stop by a signal and has left a whole checkpoint behind."""

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"stopped by signal {signal} after step {step}")
        self.signal = signal
        self.step = step

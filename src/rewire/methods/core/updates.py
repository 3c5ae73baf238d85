"""When a method updates the topology in a training of known length."""

from __future__ import annotations

from typing import Literal

from rewire.schedules import Constant, Cosine, Schedule, within

__all__ = ["LAST", "LEAST", "decay", "in_epochs", "in_steps", "length"]

#: Updates that a training of known length has room for at least, however short it is.
LEAST = 10
#: Share of a training of known length after which the topology stays, so that what has grown is
#: trained.
LAST = 0.75


def length(name: str, number: int | None) -> int | None:
    """``number`` if it is None or a whole number of at least 1, else ValueError."""
    if number is not None and (not isinstance(number, int) or number < 1):
        raise ValueError(
            f"{name} must be the number of {name} of the whole training, at least 1, not {number!r}"
        )
    return number


def in_steps(
    every: int | None,
    until: int | None,
    published: int,
    steps: int | None,
    last: float = LAST,
    begin: int = 0,
    least: int = LEAST,
) -> tuple[int, int | None]:
    """``every`` and ``until``, in optimizer steps, with what was not given (None) filled in.

    until: share ``last`` of ``steps`` where the length of the training is known, else None: no end.
    every: ``published``, or in a training of known length as many fewer as ``least`` (10) updates
        need.
    """
    steps = length("steps", steps)
    if until is None and steps is not None:
        until = int(last * steps)
    if every is not None:
        return every, until
    if steps is None or not isinstance(until, int) or not isinstance(begin, int):
        return published, until  # or what is given is refused elsewhere
    return min(published, max((until - begin) // least, 1)), until


def in_epochs(
    every: int | Literal["epoch"] | None,
    until: int | None,
    steps: int | None,
    epochs: int | None,
    *,
    scheduled: bool = False,
    least: int = LEAST,
) -> tuple[int | Literal["epoch"], int | None]:
    """``every`` and ``until`` of a method that updates at the end of each epoch, with what was not
    given filled in.

    until: three quarters of ``epochs`` where the length of the training is known, else None: no
        end.
    every: "epoch"; or, where a training of ``epochs`` epochs and ``steps`` optimizer steps has
        fewer than ``least`` (10) epochs until then, a number of steps at which there are as many
        updates, and ``until`` is a number of steps as well. Not where something else, such as a
        schedule over epochs, is ``scheduled`` by epochs.
    """
    steps, epochs = length("steps", steps), length("epochs", epochs)
    if every not in (None, "epoch"):
        return every, int(LAST * steps) if until is None and steps is not None else until
    open_ = every is None and until is None and not scheduled
    if open_ and steps is not None and epochs is not None and int(LAST * epochs) < least:
        return in_steps(None, None, steps, steps, least=least)
    return "epoch", int(LAST * epochs) if until is None and epochs is not None else until


def decay(fraction: float | Schedule, until: int | None) -> float | Schedule:
    """RigL's schedule: a number decays to 0 at ``until`` along a cosine; without ``until``, or a
    schedule: as it is.
    """
    if callable(fraction):
        return fraction
    within("fraction", fraction, 0.0, 1.0)
    if until is not None:
        within("until", until, 0)
    return Constant(fraction) if not until else Cosine(fraction, until)

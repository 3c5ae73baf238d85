"""When a method updates the topology, and how often in a training of known length."""

from __future__ import annotations

from typing import NamedTuple

from rewire.schedules import Constant, Cosine, Schedule

__all__ = ["LAST", "LEAST", "Timing", "decay", "fill_in"]

#: Updates that a training of known length has room for at least, however short it is.
LEAST = 10
#: Share of a training of known length after which the topology stays, so that what has grown is
#: trained.
LAST = 0.75


class Timing(NamedTuple):
    """Between updates, and until when there are some: in optimizer steps or in epochs, never both.

    ``every`` or ``every_epochs`` is a number. None for ``until`` and ``until_epochs``: no end.
    """

    every: int | None = None
    every_epochs: int | None = None
    until: int | None = None
    until_epochs: int | None = None

    def words(self) -> str:
        """The timing in words, for messages."""
        if self.every is not None:
            end = "" if self.until is None else f", until={self.until}"
            return f"every={self.every} steps{end}"
        end = "" if self.until_epochs is None else f", until_epochs={self.until_epochs}"
        if self.every_epochs == 1:
            return f"at the end of every epoch but the last{end}"
        return f"every_epochs={self.every_epochs}, but not after the last{end}"


def fill_in(
    given: Timing,
    published: Timing,
    total_steps: int | None,
    total_epochs: int | None,
    *,
    least: int = LEAST,
    last: float = LAST,
    begin: int = 0,
    fixed: bool = False,
) -> Timing:
    """``given``, with what was not given filled in.

    The end: share ``last`` of the training where its length is known, else no end. Between updates:
    as ``published``; or, in a training of known length, as many fewer steps as ``least`` updates
    from step ``begin`` on need. Where the published timing counts epochs and there are too few of
    them, steps count instead, unless ``fixed``: something else, such as a schedule, counts epochs.

    Raises ValueError where steps and epochs are mixed.
    """
    if given.every is not None and given.every_epochs is not None:
        raise ValueError("give every= (optimizer steps) or every_epochs=, not both")
    by_steps = given.every is not None or (
        given.every_epochs is None and published.every is not None
    )
    if by_steps:
        if given.until_epochs is not None:
            raise ValueError(
                "until_epochs= goes with every_epochs=: give until=, in optimizer steps"
            )
        return _in_steps(given, published.every, total_steps, least, last, begin)
    if given.until is not None:
        raise ValueError("until= (optimizer steps) goes with every=: give until_epochs=")
    open_ = given == Timing() and not fixed
    if open_ and total_steps is not None and total_epochs is not None:
        room = int(last * total_epochs) // (published.every_epochs or 1)
        if room < least:
            return _in_steps(given, total_steps, total_steps, least, last, begin)
    until = given.until_epochs
    if until is None and total_epochs is not None:
        until = int(last * total_epochs)
    return Timing(every_epochs=given.every_epochs or published.every_epochs, until_epochs=until)


def _in_steps(
    given: Timing, published: int | None, total: int | None, least: int, last: float, begin: int
) -> Timing:
    until = int(last * total) if given.until is None and total is not None else given.until
    every = given.every
    if every is None:
        assert published is not None
        short = None if total is None or until is None else max((until - begin) // least, 1)
        every = published if short is None else min(published, short)
    return Timing(every=every, until=until)


def decay(fraction: float | Schedule, until: int | None) -> float | Schedule:
    """RigL's schedule: a number falls to 0 at ``until`` along a cosine; without ``until`` it stays.
    A schedule is returned as it is.
    """
    if callable(fraction):
        return fraction
    return Cosine(fraction, until) if until else Constant(fraction)

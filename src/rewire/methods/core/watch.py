"""Noticing training that a method does not see: values that change although no optimizer of its own
has stepped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Print", "Watch", "fingerprint"]

#: Of one tensor: a sum over its bits, and what tells a change by an event (rewiring, loading) from
#: one by training.
Print = tuple[int, tuple[int, ...]]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(values: Tensor) -> int:
    """A sum over the bits of a tensor, which any change of its values changes (but for a chance of
    about 2^-32).

    Exact integers, so it does not depend on threads. O(n) time, O(1) memory; 0 where there are no
    values (meta).
    """
    if values.device.type == "meta" or not values.numel():
        return 0
    flat = values.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64))


class Watch:
    """Remembers fingerprints of a method's weights at moments when no optimizer has stepped, and
    compares them.

    ``weights`` gives, for each number, the name, the tensor, and numbers that are other ones after
    an event. While all weights take part in all steps, one sum per weight is computed at the end of
    each epoch. Those that take no part in a step (frozen, unused, another optimizer's turn) cost
    one each.
    """

    def __init__(
        self, weights: Callable[[], Sequence[tuple[str, Tensor, tuple[int, ...]]]]
    ) -> None:
        self._weights = weights
        #: Calls of `Method.step` in this epoch that no optimizer step had preceded.
        self.idle = 0
        #: Whether an optimizer has ever stepped, here or in the run that this one resumes.
        self.ever = False
        self._epoch = self._prints()
        self._last: dict[int, Print] | None = None  # at the last call, if no step preceded it
        self._missed: dict[int, Print] = {}  # of weights that took no part in the last step

    def _prints(self, without: frozenset[int] | set[int] = frozenset()) -> dict[int, Print]:
        weights = enumerate(self._weights())
        return {
            i: (fingerprint(values), version)
            for i, (_, values, version) in weights
            if i not in without
        }

    def _changed(self, before: dict[int, Print], now: dict[int, Print]) -> list[str]:
        """Names of the weights that something other than an event has changed."""
        names = [name for name, _, _ in self._weights()]
        return [
            names[i]
            for i, (value, version) in now.items()
            if i in before and before[i][1] == version and before[i][0] != value
        ]

    def stepped(self) -> None:
        """An optimizer has stepped."""
        self.ever = True
        self._last = None

    def nothing_stepped(self) -> None:
        """`Method.step` was called without an optimizer's step; RuntimeError if weights are trained
        nevertheless.
        """
        self.idle += 1
        now = self._prints()
        if self._last is not None:
            _refuse(self._changed(self._last, now))
        self._last = now

    def missed(self, fresh: set[int]) -> None:
        """The same for weights that took no part in this step, nor in the one before: all but
        ``fresh``.
        """
        before, self._missed = self._missed, self._prints(without=fresh)
        _refuse(self._changed(before, self._missed))

    def acted(self) -> None:
        """The method has acted on the step; what it has changed of weights that took no part is
        remembered as it is.
        """
        versions = [version for _, _, version in self._weights()]
        for i in [i for i, (_, version) in self._missed.items() if versions[i] != version]:
            self._missed[i] = fingerprint(self._weights()[i][1]), versions[i]

    def end_epoch(self, seen: set[int]) -> bool:
        """RuntimeError if weights that took no part in any step of the epoch were trained
        nevertheless.

        Returns whether steps were asked for and none was made (all were skipped).
        """
        if not self.ever and not self.idle:
            raise RuntimeError(_NEVER)
        if len(seen) < len(self._weights()):
            _refuse(self._changed(self._epoch, self._prints(without=seen)))
        return self.idle > 0 and not seen

    def begin_epoch(self) -> None:
        """Compare with this moment at the end of the epoch that begins."""
        self.idle = 0
        self._epoch = self._prints()

    def loaded(self, *, resumed: bool = False) -> None:
        """Weights or the method were loaded: what was remembered is not theirs."""
        self.ever = self.ever or resumed
        self._last, self._missed = None, {}
        self._epoch = self._prints()


_NEVER = (
    "no step of the method's optimizer was seen before the end of the epoch: make the method with "
    "the optimizer that trains the model (a copy or a new optimizer needs a method of its own)"
)


def _refuse(names: list[str]) -> None:
    if names:
        raise RuntimeError(
            f"no step of the method's optimizer was seen, but {', '.join(names[:5])} changed: "
            "something else trains them (a new or another optimizer, or one that updates weights "
            "elsewhere than in step()). Make the method with the optimizer that trains the model, "
            "the outermost one where one wraps another; for a new optimizer make a new method and "
            "give it this one's state_dict()"
        )

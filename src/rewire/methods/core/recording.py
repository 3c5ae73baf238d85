"""What backward passes tell about gradients, for as long as their results are in ``.grad``.

A `Recorder` is on a weight while a method asks for the gradients of a step. It keeps the calls of
the layer (pairs), or the gradient of the candidates' probe, of the backward passes that reached the
weight's ``.grad``, and throws them away when that is thrown away. Just before the optimizer's step
they become a `Record`, which nothing changes any more: ``zero_grad`` and further backward passes
may follow in any order.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from rewire import ops
from rewire.distributed import sum_over_ranks
from rewire.nn import Candidates, SparseWeight

__all__ = ["Record", "Recorder", "Status"]

#: Gradients compared before and after the user's own steps (averaging, unscaling, clipping), at
#: most, evenly spaced.
_SAMPLE = 1 << 16


class Status(IntEnum):
    """What a record has. Ranks that differ agree on the highest."""

    #: The weight took no part in the step: its gradient is zero, at dormant positions too.
    NOTHING = 0
    #: There is a gradient, and it is not known where from: of a compiled layer, or put there by
    #: hand.
    UNKNOWN = 1
    COMPLETE = 2
    #: Some backward passes whose results are in ``.grad`` ran before the method asked.
    PARTIAL = 3


@dataclass
class Record:
    """The gradients of one step, as the backward passes gave them: raw, and of this rank's samples.

    pairs: the calls of the layer. probed: the gradient of `rewire.nn.Candidates.probe`.
    """

    weight: SparseWeight
    status: Status
    pairs: list[ops.Pair]
    probed: Tensor | None
    _raw: Tensor | None
    _final: Tensor
    _divisor: float
    _scale: float | None = field(default=None, init=False)

    def agree(self) -> Status:
        """`status`, of all ranks. (A layer may have run on some of them only.)"""
        if self.weight.shared_seed is not None:
            mine = torch.zeros(len(Status), device=self.weight.device)
            mine[self.status] = 1
            self.status = Status(int(sum_over_ranks(self.weight, mine).nonzero().max()))
        return self.status

    def scale(self) -> float:
        """What to multiply sums over ranks of raw gradients by to get those that the optimizer
        uses.

        From the active connections, by least squares: exact where all gradients were multiplied by
        one number (a GradScaler, DDP's average, clipping by norm), else the nearest one. 1 where
        nothing is known.
        """
        if self._scale is None:
            final = self._final.double()
            own = (
                torch.zeros_like(final)
                if self._raw is None
                else self._raw.to(torch.float64, copy=True)
            )
            raw = sum_over_ranks(self.weight, own)
            size = float(raw @ raw)
            scale = float(raw @ final) / size if size > 0 else 1.0
            self._scale = (scale if math.isfinite(scale) else 1.0) / self._divisor
        return self._scale


class Recorder:
    """Records one weight until `close`, or until ``owner`` is no more; then the weight is as
    before.

    Where the weight has candidates, their gradients are recorded; else it becomes
    ``weight.capture``, which layers give their calls to. Cost: what it keeps, and per backward pass
    two looks at the gradient, O(capacity).
    """

    def __init__(self, owner: Any, weight: SparseWeight) -> None:
        self._weight, self.candidates = weight, weight.candidates
        #: Of the last step; None before there was one.
        self.record: Record | None = None
        #: By graph task (a backward pass; checkpointing nests them): what has not reached ``.grad``
        #: yet.
        self._pending: dict[int, tuple[list[ops.Pair], list[Tensor]]] = {}
        self._reached: set[int] = set()  # graph tasks that have given .grad what they had for it
        # and those in the middle of which the optimizer has stepped
        self._stepped: set[int] = set()
        self._pairs: list[ops.Pair] = []
        self._probes: list[Tensor] = []
        self._raw: Tensor | None = None
        self._forget()
        values, here = weight.values, weakref.ref(self)
        self._handles = [
            values.register_hook(lambda gradient: _told(here, Recorder._before)),
            values.register_post_accumulate_grad_hook(
                lambda values: _told(here, Recorder._accumulated)
            ),
        ]
        if self.candidates is None:
            weight.capture = self
        else:
            probe = self.candidates.probe
            self._handles.append(
                probe.register_post_accumulate_grad_hook(lambda p: _told(here, Recorder._probed))
            )
        self._end = weakref.finalize(owner, _close, weight, self._handles, self.candidates, here)
        self._end.atexit = False

    def close(self) -> None:
        """Take everything off the weight."""
        self._end()
        self._forget()
        self._pending.clear()

    def current(self) -> bool:
        """Whether it is still on the weight: changes of a pool discard its candidates."""
        if self.candidates is None:
            return self._weight.capture is self and self._weight.candidates is None
        return self._weight.candidates is self.candidates

    # --- during backward passes -------------------------------------------------------------------

    def append(self, pair: ops.Pair) -> None:
        """A call of the layer whose backward is under way."""
        self._open()[0].append(pair)

    def _open(self) -> tuple[list[ops.Pair], list[Tensor]]:
        task: int = torch._C._current_graph_task_id()
        if task not in self._pending:
            self._pending[task] = [], []
            # What has not reached .grad by the end of the pass never will: torch.autograd.grad, or
            # inputs=.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._ended(task))
        return self._pending[task]

    def _ended(self, task: int) -> None:
        pairs, probes = self._pending.pop(task, ((), ()))
        # a compiled graph may give the probe its gradient after the values theirs
        if task in self._reached:
            self._pairs.extend(pairs)
            self._probes.extend(probes)
        self._reached.discard(task)
        self._stepped.discard(task)

    def _probed(self) -> None:
        probe = self.candidates.probe if self.candidates is not None else None
        if probe is not None and probe.grad is not None:
            self._open()[1].append(probe.grad.detach())
            probe.grad = None

    def _before(self) -> None:
        """A gradient is about to be added to ``.grad``."""
        gradient = self._weight.values.grad
        self._check(gradient)
        if not self._any:
            self._foreign = gradient is not None and bool(gradient.any())

    def _check(self, gradient: Tensor | None) -> None:
        """Forget what was in ``.grad`` if that has been thrown away since."""
        if self._any and (gradient is None or (self._nonzero and not bool(gradient.any()))):
            self._forget()

    def _accumulated(self) -> None:
        task = torch._C._current_graph_task_id()
        gradient = self._weight.values.grad
        pairs, probes = self._open()
        nonzero = gradient is not None and bool(gradient.any())
        # another hook has made the step already
        if gradient is None or (task in self._stepped and not nonzero):
            self._forget()
        else:
            self._reached.add(task)
            self._pairs.extend(pairs)
            self._probes.extend(probes)
            self._any, self._nonzero = True, nonzero
            self._raw = gradient.detach()[:: self._stride()].clone()
        self._pending[task] = [], []

    def _stride(self) -> int:
        return -(-self._weight.capacity // _SAMPLE) or 1

    def _forget(self) -> None:
        self._pairs, self._probes, self._raw = [], [], None
        self._any = self._nonzero = self._foreign = False

    # --- before the step --------------------------------------------------------------------------

    def freeze(self, divisor: float) -> None:
        """Make the record of the step that an optimizer is about to make with the gradients as they
        are.

        divisor: what the optimizer divides them by itself, see
            `rewire.methods.core.attachment.gradient_scale`.
        """
        weight, gradient = self._weight, self._weight.values.grad
        task = torch._C._current_graph_task_id()
        # no backward pass is under way, so what is left is of one that ended in an error
        if task < 0:
            self._pending.clear()
            self._reached.clear()
            self._stepped.clear()
        self._check(gradient)
        if gradient is None:
            return
        pairs, probes = self._pending.get(task, ((), ()))
        # the step is made in a hook of the backward pass, one that ran before ours
        if pairs or probes:
            self._stepped.add(task)
            raw = None
        else:
            raw = self._raw
        pairs, probes = [*self._pairs, *pairs], [*self._probes, *probes]
        probed = torch.stack(probes).sum(0) if len(probes) > 1 else probes[0] if probes else None
        final = gradient.detach()[:: self._stride()].clone()
        if raw is not None and raw.shape != final.shape:  # the pool has been resized since
            raw = None
        if task >= 0 and raw is None:
            raw = final
        if self._foreign and self._any:
            status = Status.PARTIAL
        elif pairs or probed is not None:
            status = Status.COMPLETE
        elif not bool(gradient.any()) or (self._any and not weight.traced):
            status = Status.NOTHING
        else:
            status = Status.UNKNOWN
        self.record = Record(weight, status, pairs, probed, raw, final, divisor)


def _told(recorder: weakref.ref[Recorder], what: Any) -> None:
    here = recorder()
    if here is not None:
        what(here)


def _close(
    weight: SparseWeight,
    handles: list[Any],
    candidates: Candidates | None,
    recorder: weakref.ref[Recorder],
) -> None:
    for handle in handles:
        handle.remove()
    if candidates is not None and weight.candidates is candidates:
        weight.candidates = None
    if candidates is None and isinstance(weight.capture, Recorder) and weight.capture is recorder():
        weight.capture = None

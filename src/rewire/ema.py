"""Exponential moving averages of weights that follow their connections."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rewire.nn import Event, SparseWeight, sparse_weights
from rewire.nn.optimizers.followers import gathered
from rewire.nn.structure import Part, follow_structure
from rewire.nn.weight import seal

__all__ = ["ExponentialMovingAverage", "get_ema_multi_avg_fn", "get_swa_multi_avg_fn"]


class ExponentialMovingAverage:
    """``average <- decay * average + (1 - decay) * parameter`` for every parameter of a model.

    `torch.optim.swa_utils.AveragedModel`, with a function of PyTorch, averages slot by slot,
    whatever the slots hold. This class follows the model: the average of a new connection starts at
    the connection's value, and averages move with slots. When a layer is cut or made sparse
    (`rewire.to_sparse`, `remove_units`, the methods that start dense), its averages are cut as
    well, and when a method goes back to an earlier network they start there. What a merge of units
    adds to other weights reaches the average like any update.

    Buffers are not averaged: the statistics of a BatchNorm are those of the model (`applied`), or
    of the copy that `copy_to` writes to; `torch.optim.swa_utils.update_bn` measures them anew.

    Args:
        model: averaged; its parameters are followed until `detach`.
        decay: in [0, 1).

    Cost: one more number per parameter; O(parameters) per update.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.decay = _checked(decay)
        self._model = model
        self._average: dict[Tensor, Tensor] = {}
        #: What follows the parameters: the averages and, while they are in the model, its own
        #: values.
        self._kept = [self._average]
        self._handles: dict[Tensor, list[Any]] = {}
        # Parameters that replaced others since the model was last looked at.
        self._arrived: list[Tensor] = []
        pools = {w.values: w for _, w in sparse_weights(model)}
        for parameter in model.parameters():
            self._join(parameter, pools.get(parameter))
            self._average[parameter] = parameter.detach().clone()

    @torch.no_grad()
    def update(self) -> None:
        """Add the present parameters to the average; call after each step of optimizer and method.

        Raises RuntimeError if parameters were replaced without an announcement
        (`rewire.nn.structure`), such as by `rewire.sparsify` or by hand.
        """
        for _, parameter, average in self._pairs():
            average.lerp_(parameter.detach().to(average), 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with averaged weights inside the ``with``, and with its own weights
        afterwards.
        """
        pairs = self._pairs()
        own = {p: p.detach().clone() for _, p, _ in pairs}
        self._kept.append(own)
        try:
            with torch.no_grad():
                for _, parameter, average in pairs:
                    parameter.copy_(average)
            yield self._model
        finally:
            self._kept = self._kept[:1]
            with torch.no_grad():
                for parameter, value in own.items():
                    parameter.copy_(value)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into a model of the same structure and topology, such as a deepcopy.

        Raises ValueError, with nothing changed, if names, shapes or connections differ.
        """
        averages = {n: average for n, _, average in self._pairs()}
        theirs = dict(model.named_parameters())
        if {n: p.shape for n, p in theirs.items()} != {n: t.shape for n, t in averages.items()}:
            raise ValueError(
                "names or shapes of this model's parameters are not those of the averages: copy to "
                "a copy"
            )
        mine = dict(sparse_weights(self._model))
        for name, weight in sparse_weights(model):
            same = name in mine and torch.equal(weight.rows, mine[name].rows.to(weight.rows))
            if not same or not torch.equal(weight.cols, mine[name].cols.to(weight.cols)):
                raise ValueError(
                    f"{name} has other connections than the averages are of: copy to a copy made "
                    "now"
                )
        for name, parameter in theirs.items():
            parameter.copy_(averages[name])

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, and the decay."""
        return {
            "decay": self.decay,
            "average": {n: average.clone() for n, _, average in self._pairs()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`; load the model first.

        Raises ValueError if the state is damaged or has other names or shapes than the model.
        """
        try:
            decay, new = _checked(state["decay"]), dict(state["average"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"this state of an average is incomplete or damaged: {error!r}"
            ) from None
        for n, t in new.items():
            if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
                raise ValueError(
                    f"this state of an average is damaged: {n!r} is not a tensor of floating-point "
                    "numbers"
                )
        pairs = self._pairs()
        if {n: t.shape for n, t in new.items()} != {n: p.shape for n, p, _ in pairs}:
            raise ValueError(
                "these averages belong to another model: names or shapes differ; load the model "
                "first"
            )
        self.decay = decay
        self._average.update({p: new[n].detach().to(p.device, copy=True) for n, p, _ in pairs})

    def detach(self) -> None:
        """Stop following the model."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()

    # --- following the model ----------------------------------------------------------------------

    def _pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        """Name, parameter and average of everything in the model now; new averages start at the
        parameters.
        """
        there = dict(self._model.named_parameters())
        present = set(there.values())
        lost = [parameter for parameter in self._average if parameter not in present]
        new = {n: p for n, p in there.items() if p not in self._average and p not in self._handles}
        if any(parameter not in present for parameter in self._arrived):
            raise RuntimeError(
                "the model is one layer and was replaced as a whole: make a new average, of the "
                "model that finalize() or to_sparse() returned"
            )
        if lost and new:
            raise RuntimeError(
                f"parameters of the model were replaced ({', '.join(new)} are new): make a new "
                "average after layers were converted (rewire.sparsify, rewire.densify)"
            )
        self._arrived.clear()
        for parameter in lost:
            self._leave(parameter)
        if new:
            pools = {w.values: w for _, w in sparse_weights(self._model)}
            for parameter in new.values():
                self._join(parameter, pools.get(parameter))
        found: list[tuple[str, Tensor, Tensor]] = []
        for name, parameter in there.items():
            average = self._average.get(parameter)
            if average is None:
                average = self._average[parameter] = parameter.detach().clone()
            if average.shape != parameter.shape:
                raise RuntimeError(
                    f"{name} was of shape {tuple(average.shape)} and is of shape "
                    f"{tuple(parameter.shape)} now, and nothing announced it: make a new average "
                    "after tensors were exchanged by hand"
                )
            found.append((name, parameter, average))
        return found

    def _join(self, parameter: Tensor, weight: SparseWeight | None) -> None:
        here = weakref.ref(self)

        def restructured(old: Tensor, parts: Sequence[Part]) -> None:
            if (average := here()) is not None:
                average._restructure(old, parts)

        def changed(event: Event) -> None:
            if (average := here()) is not None:
                average._follow(event)

        handles = [follow_structure(parameter, restructured)]
        if weight is not None:
            handles.append(weight.follow(changed))
        self._handles[parameter] = handles

    def _leave(self, parameter: Tensor) -> None:
        for handle in self._handles.pop(parameter, ()):
            handle.remove()
        for kept in self._kept:
            kept.pop(parameter, None)

    @torch.no_grad()
    def _follow(self, event: Event) -> None:
        """A sparse weight has changed."""
        values = event.weight.values
        for kept in self._kept:
            if values in kept:
                kept[values] = _moved(kept[values], event)

    @torch.no_grad()
    def _restructure(self, old: Tensor, parts: Sequence[Part]) -> None:
        """Another parameter has changed, or was replaced."""
        for kept in self._kept:
            before = kept.pop(old, None)
            for part in parts:
                if before is not None and part.take is not None:
                    kept[part.parameter] = part.take(before)
        if all(part.parameter is not old for part in parts):
            self._leave(old)
            for part in parts:
                self._join(part.parameter, part.weight)
                self._arrived.append(part.parameter)


def _checked(decay: Any) -> float:
    number = isinstance(decay, int | float) and not isinstance(decay, bool)
    if not number or not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be at least 0 and below 1, not {decay!r}")
    return float(decay)


def _moved(average: Tensor, event: Event) -> Tensor:
    """The average for the slots as they are now; new connections start at their values."""
    values = event.weight.values.detach().to(average)
    if event.loaded:
        return values.clone()
    if event.source is not None:
        source = event.source
        average = gathered(average, source, 0.0)
    average[event.slots] = values[event.slots]
    return average


# --- for torch.optim.swa_utils.AveragedModel ------------------------------------------------------


def get_ema_multi_avg_fn(model: nn.Module, decay: float = 0.999) -> MultiAverage:
    """An exponential moving average that follows the connections of ``model``, for PyTorch's
    `AveragedModel`::

        averaged = AveragedModel(model, multi_avg_fn=rewire.ema.get_ema_multi_avg_fn(model))

    In ``averaged.module`` each connection of the model then has its own average, as in
    `ExponentialMovingAverage`, and each update takes the model's topology over. With
    ``use_buffers=True`` other floating-point buffers are averaged, and integers copied.

    Make the function before the `AveragedModel`, and use it for that one. Sparse weights may be
    resized after the first update (in which PyTorch copies tensors, so that sizes must fit). If
    parameters are cut or replaced (`to_sparse`, units removed), the next update raises
    RuntimeError: make a new function and model then.

    Args:
        decay: in [0, 1).

    Cost: two more numbers per slot; per update O(parameters), and O(K log K) for weights that were
    rewired.
    """
    decay = _checked(decay)
    return MultiAverage(model, lambda n: 1.0 - decay)


def get_swa_multi_avg_fn(model: nn.Module) -> MultiAverage:
    """As `get_ema_multi_avg_fn`, for the mean over all updates (stochastic weight averaging).

    For a connection that grew later, its first value stands for all updates before.
    """
    return MultiAverage(model, lambda n: 1.0 / (n + 1))


class MultiAverage:
    """The function that `get_ema_multi_avg_fn` and `get_swa_multi_avg_fn` return.

    `AveragedModel` calls it with the averages, the parameters and the number of updates so far.
    """

    _tokens = itertools.count()

    def __init__(self, model: nn.Module, rate: Callable[[int], float]) -> None:
        self._rate = rate
        self._token = next(self._tokens)
        self._skip: set[int] = set()
        self._replaced = False
        here = weakref.ref(self)
        self._pools = [
            _Births(weight, (self._token, n)) for n, (_, weight) in enumerate(sparse_weights(model))
        ]
        self._handles = [births.handle for births in self._pools]
        self._handles += [
            follow_structure(p, lambda old, parts: _note_replaced(here)) for p in model.parameters()
        ]
        for births in self._pools:
            births.weight.feed_copies(births.mark)
            weakref.finalize(self, seal.forget, births.mark)

    def __deepcopy__(self, memo: object) -> MultiAverage:
        return self  # as functions do

    @torch.no_grad()
    def __call__(
        self, averages: Sequence[Tensor], parameters: Sequence[Tensor], count: Tensor | int
    ) -> None:
        if self._replaced:
            raise RuntimeError(
                "parameters of the model were cut or replaced since this averaging function was "
                "made: make a new AveragedModel, with a new function"
            )
        fed = {w: births for births in self._pools for w in births.copies()}
        by_values = {w.values.data_ptr(): w for w in fed}
        self._skip |= {b.data_ptr() for w in fed for b in w.buffers()}
        rate = self._rate(int(count))
        for average, parameter in zip(averages, parameters, strict=True):
            copy = by_values.get(average.data_ptr())
            if copy is not None:
                fed[copy].average(copy, average, parameter, rate)
            elif average.data_ptr() in self._skip:
                continue  # part of a topology, which goes with its values
            elif average.shape != parameter.shape:
                raise RuntimeError(
                    f"an average of shape {tuple(average.shape)} meets a parameter of shape "
                    f"{tuple(parameter.shape)}: the model is not what it was, so make a new "
                    "AveragedModel"
                )
            elif average.is_floating_point() or average.is_complex():
                average.lerp_(parameter.to(average), rate)
            else:
                average.copy_(parameter)


def _note_replaced(average: weakref.ref[MultiAverage]) -> None:
    here = average()
    if here is not None:
        here._replaced = True


class _Births:
    """When each connection of a weight grew, and with which value, where its average begins."""

    def __init__(self, weight: SparseWeight, mark: object) -> None:
        self.weight, self.mark = weight, mark
        self.clock = 0
        #: Number of the event that made each slot's connection (int64), and the value it had then.
        self.born = torch.zeros(weight.capacity, dtype=torch.int64, device=weight.device)
        self.start = weight.values.detach().clone()
        #: The number of the last event that each averaged copy knows of.
        self._seen: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        here = weakref.ref(self)
        self.handle = weight.follow(lambda event: _note_birth(here, event))

    def copies(self) -> list[Any]:
        """The averaged copies of this pool."""
        return list(seal.fed(self.mark))

    @torch.no_grad()
    def note(self, event: Event) -> None:
        for copy in self.copies():
            # The first update of the AveragedModel was before this event.
            if copy not in self._seen and copy.written:
                self._seen[copy] = self.clock
        self.clock += 1
        values = event.weight.values.detach()
        if event.loaded:  # averages, which may be loaded too, go on by position
            self.born, self.start = torch.zeros_like(event.slots), values.clone()
            self._seen.clear()
            return
        if event.source is not None:
            at = event.source.clamp(min=0)
            self.born, self.start = self.born[at], self.start[at]
        self.born[event.slots] = self.clock
        self.start[event.slots] = values[event.slots].to(self.start)

    def average(self, copy: Any, average: Tensor, parameter: Tensor, rate: float) -> None:
        """Update ``copy``, whose values are ``average``, and give it this weight's topology."""
        seen = self._seen.get(copy)
        self._seen[copy] = self.clock
        if seen == self.clock:
            average.lerp_(parameter.to(average), rate)
            return
        copy.check_positions()
        weight, device, slots = self.weight, copy.device, copy.active()
        rows, cols = weight.rows.to(device).long(), weight.cols.to(device).long()
        width = weight.matrix_shape[1]
        known = copy.rows[slots].long() * width + copy.cols[slots].long()  # ascending
        wanted = rows * width + cols
        at = torch.searchsorted(known, wanted).clamp(max=max(known.numel() - 1, 0))
        there = torch.zeros_like(rows, dtype=torch.bool)
        if known.numel():
            there = (rows >= 0) & (known[at] == wanted)
        if seen is not None:
            there &= self.born.to(device) <= seen  # dropped and grown again at the same place
        before = self.start.to(device=device, dtype=average.dtype)
        if known.numel():
            before = torch.where(there, average[slots[at]], before)
        new = before.lerp(weight.values.detach().to(before), rate).masked_fill(rows < 0, 0.0)
        copy.load_state_dict(weight.state_dict() | {"values": new})


def _note_birth(births: weakref.ref[_Births], event: Event) -> None:
    here = births()
    if here is not None:
        here.note(event)

"""What the units of a model do over data: inputs and outputs of every sparse weight, recorded
without a trace.

For a weight, the *source* is what its columns read and the *target* what its rows give, over all
samples (and, in a convolution, all output positions; in a sequence, all steps). ``activations``
says which numbers these are:

"pre" (CosineSET, the output of Keras's Dense layers): the target is the layer's own output, before
any activation
    function. The source is, likewise, the output of the layer with a weight (sparse or dense,
    linear or convolution) that ran just before, where that has the shape of this layer's input;
    else (the first layer, pooling or flattening in between) the layer's input as it is.
"post" (CTRE): the source is the layer's input as it is. The target is the input of the layer with a
weight that ran
    next, where that has the shape of this one's output; of the output layer the softmax (of a
    single number the sigmoid); else the output rectified.

The target of a difference beside a dense weight (`rewire.adapt`) is what both give together.

The weights inside recurrent layers and of attention's queries, keys and values have one rule for
both: the source is what the weight multiplies (inputs, hidden states), the target that product,
without bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from rewire import random
from rewire.distributed import sum_over_ranks
from rewire.methods.core.base import Data, Pool
from rewire.methods.core.parameters import check
from rewire.nn import SparseWeight
from rewire.nn.forward.tensors import first_input, first_tensor, tensors_in
from rewire.nn.layers.adapted import Adapted
from rewire.nn.layers.base import SparseLayer
from rewire.ops.kernels import spmm
from rewire.ops.pairs import Pair

__all__ = ["Mode", "Recorder", "Which"]

Which = Literal["pre", "post"]
Mode = Literal["eval", "train"]
Batch = Tensor | PackedSequence

#: Random stream of the rows to look at; streams below `Purpose.COUNT` belong to no pool.
_ROWS, _TORCH = 1, 2
_WITH_WEIGHT = (SparseLayer, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Recorder:
    """Runs a model over data and keeps what its sparse weights read and gave.

    Args:
        model: whose weights they are.
        data: see `rewire.methods.core.base.Data`.
        samples: rows of data (counted along the first dimension of the inputs) drawn anew, without
            replacement, for each recording; None for all there are.
        mode: "eval", or "train" for dropout and batch statistics as in training.
        activations: "pre" or "post", see above.
        centred: take what a layer reads of the model's data from its mean over the rows, as
            standardised inputs are.

    Raises ValueError for data that can be gone through only once, or fewer samples than 1.

    A recording is a function of the model, the data, seed and step: it draws its own random numbers
    and leaves the model's modes, buffers and gradients and torch's random state as they were.

    Cost: one forward pass over the rows (with recurrent or attention layers, also a backward one,
    for their inner weights), O(rows x features of all layers) memory. With ``samples``, the data
    are read once more.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        samples: int | None = None,
        mode: Mode = "eval",
        activations: Which = "pre",
        centred: bool = False,
    ) -> None:
        # Not iter(data): a DataLoader would draw a number for it.
        if not isinstance(data, Iterable) or isinstance(data, Iterator):
            raise ValueError(
                "data must be batches that can be gone through again and again (a list or a "
                f"DataLoader), not {type(data).__name__}, which is used up after once"
            )
        if samples is not None and (not isinstance(samples, int) or samples < 1):
            raise ValueError(
                f"samples must be a number of rows of at least 1, or None for all, not {samples!r}"
            )
        check("mode", mode, Mode)
        check("activations", activations, Which)
        self.model, self.data, self.samples, self.mode, self.activations = (
            model,
            data,
            samples,
            mode,
            activations,
        )
        self.centred = centred

    def record(
        self, pools: Sequence[Pool], seed: int, step: int
    ) -> tuple[dict[int, list[Pair]], int | None]:
        """``(pairs, output)``: of each pool, by number, its (source, target) pairs, one per call of
        its layer and batch of one shape; and the number of the pool of the output layer.

        The output layer is the last layer of one weight that ran, if it is not the model's only
        pool. A pool whose layer did not run is missing.
        """
        run = _Run(self.model, pools, self.activations, self.centred)
        # Compiled code would be compiled anew for the hooks, twice an update.
        eager = torch.compiler.set_stance("force_eager")
        with _untouched(self.model, self.mode == "train", seed, step), run.hooks(), eager:
            for batch in self._rows(seed, step):
                run.batch(batch)
        return run.pairs(), run.output

    def _rows(self, seed: int, step: int) -> Iterator[Batch]:
        device = next(self.model.parameters()).device
        if self.samples is None:
            for batch in map(_inputs, self.data):
                yield batch.to(device)  # type: ignore[arg-type]  # packed sequences take devices too
            return
        lengths = [_length(batch) for batch in map(_inputs, self.data)]
        total = sum(lengths)
        chosen = random.distinct(min(self.samples, total), total, seed, step, _ROWS)
        ends = list(itertools.accumulate(lengths))
        for batch, end, length in zip(map(_inputs, self.data), ends, lengths, strict=True):
            here = chosen[(chosen >= end - length) & (chosen < end)] - (end - length)
            if here.numel():
                assert isinstance(batch, Tensor)
                yield batch[here.to(batch.device)].to(device)


def _inputs(batch: Any) -> Batch:
    """The inputs of a batch: itself, or the first of a tuple or list."""
    while isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        batch = batch[0]
    if not isinstance(batch, Tensor | PackedSequence):
        kind = type(batch).__name__
        raise ValueError(
            f"data must give inputs, or tuples that begin with them, as tensors, not {kind}"
        )
    return batch


def _length(batch: Batch) -> int:
    if isinstance(batch, PackedSequence):
        raise ValueError(
            "samples= cannot pick rows of packed sequences: leave it None, or give fewer data"
        )
    return batch.shape[0]


@contextmanager
def _untouched(model: nn.Module, train: bool, seed: int, step: int) -> Iterator[None]:
    """Modes, buffers, captures and torch's random state are afterwards what they are now."""
    modes = [(module, module.training) for module in model.modules()]
    weights = [module for module in model.modules() if isinstance(module, SparseWeight)]
    captures = [weight.capture for weight in weights]
    topology = {id(buffer) for weight in weights for buffer in weight.buffers()}
    buffers = [b for b in model.buffers() if id(b) not in topology] if train else []
    before = [b.clone() for b in buffers]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    number = random.bits(seed, step, _TORCH, torch.zeros(1, dtype=torch.int64))
    with torch.random.fork_rng(sorted(d.index for d in devices)):
        torch.manual_seed(int(number))
        model.train(train)
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for weight, capture in zip(weights, captures, strict=True):
                weight.capture = capture
            with torch.no_grad():
                for buffer, old in zip(buffers, before, strict=True):
                    buffer.copy_(old)


class _Call:
    """One call of a layer with a weight: its input, kept if needed, and its output."""

    def __init__(self, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        self.layer, self.x, self.y = layer, x, y
        self.before: _Call | None = None


class _Run:
    """One recording: hooks that note the calls of a batch, and what is kept of them."""

    def __init__(
        self, model: nn.Module, pools: Sequence[Pool], which: Which, centred: bool
    ) -> None:
        self.model, self.which, self.centred = model, which, centred
        self.weights = {pool.number: pool.weight for pool in pools}
        #: Pools whose layers read what the model is given.
        self.first: set[int] = set()
        self.numbers = {id(pool.weight): pool.number for pool in pools}
        self.layers = [m for m in model.modules() if isinstance(m, _WITH_WEIGHT)]
        held = {id(layer.weight) for layer in self.layers if isinstance(layer, SparseLayer)}
        #: Pools inside recurrent and attention layers, whose inputs no hook sees.
        self.inner = [pool.weight for pool in pools if id(pool.weight) not in held]
        self.outer = [
            m
            for m in model.modules()
            if any(isinstance(c, SparseWeight) for c in m.children())
            and not isinstance(m, SparseLayer)
        ]
        self.calls: list[_Call | None] = []
        self.kept: dict[
            tuple[int, Any, tuple[int, ...], tuple[int, ...]], tuple[list[Tensor], list[Tensor]]
        ] = {}
        self.output: int | None = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [
            layer.register_forward_hook(self._called, with_kwargs=True) for layer in self.layers
        ]
        # What runs inside or behind these does not follow what ran before, whatever the shapes.
        handles += [layer.register_forward_pre_hook(self._apart) for layer in self.outer]
        handles += [layer.register_forward_hook(self._apart) for layer in self.outer]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _apart(self, *_: Any) -> None:
        self.calls.append(None)

    def _called(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        x, y = first_tensor(first_input(layer, args, kwargs)), first_tensor(output)
        if x is None or y is None:
            self.calls.append(None)
            return
        last = self.calls[-1] if self.calls else None
        if isinstance(layer, Adapted) and last is not None and last.layer is layer.difference:
            last.y = y.detach().clone()  # the units of both are the same
            return
        # Copies, because an activation may be made in place, and so may a residual sum on the
        # input.
        self.calls.append(_Call(layer, x.detach().clone(), y.detach().clone()))

    def batch(self, x: Batch) -> None:
        """Run one batch and keep what is wanted of it."""
        self.calls = []
        for weight in self.inner:
            weight.capture = []
        with torch.set_grad_enabled(bool(self.inner)):
            result = self.model(x)
        if self.inner:
            self._inside(result)
        last = next((call for call in reversed(self.calls) if call is not None), None)
        if last is not None and len(self.numbers) > 1 and isinstance(last.layer, SparseLayer):
            self.output = self.numbers.get(id(last.layer.weight))
        for before, call, after in zip(
            [None, *self.calls], self.calls, [*self.calls[1:], None], strict=False
        ):
            if (
                call is not None
                and isinstance(call.layer, SparseLayer)
                and id(call.layer.weight) in self.numbers
            ):
                if call is self.calls[0]:
                    self.first.add(self.numbers[id(call.layer.weight)])
                self._keep(call.layer, *self._sides(before, call, after, call is last))
        self.calls = []

    def _sides(
        self, before: _Call | None, call: _Call, after: _Call | None, last: bool
    ) -> tuple[Tensor, Tensor]:
        x, y = call.x, call.y
        if self.which == "pre":
            return (before.y if before is not None and before.y.shape == x.shape else x), y
        if last and len(self.numbers) > 1:
            axis = call.layer.rows_axis if isinstance(call.layer, SparseLayer) else -1
            return x, y.sigmoid() if y.shape[axis] == 1 else y.softmax(axis)
        return x, after.x if after is not None and after.x.shape == y.shape else F.relu(y)

    def _keep(self, layer: SparseLayer, x: Tensor, y: Tensor) -> None:
        pair = layer.pair(x, y)
        self._add(self.numbers[id(layer.weight)], pair.x, pair.g, pair.geometry)

    def _add(self, number: int, x: Tensor, y: Tensor, geometry: Any = None) -> None:
        lists = self.kept.setdefault(
            (number, geometry, tuple(x.shape[1:]), tuple(y.shape[1:])), ([], [])
        )
        lists[0].append(x)
        lists[1].append(y)

    def _inside(self, result: Any) -> None:
        """Inner weights tell their inputs to ``capture`` in a backward pass, whatever the gradient
        is.
        """
        reached = [t for t in tensors_in(result) if t.requires_grad]
        values = [weight.values for weight in self.inner]
        if reached:
            torch.autograd.grad(
                reached, values, [torch.ones_like(t) for t in reached], allow_unused=True
            )
        for weight in self.inner:
            index = weight.index
            for pair in weight.capture if isinstance(weight.capture, list) else ():
                x = pair.x.clone()
                with torch.no_grad():
                    y = spmm(index.row_ptr, index.row_cols, index.row_slots, weight.values, x)
                self._add(self.numbers[id(weight)], x, y)
            weight.capture = None

    def pairs(self) -> dict[int, list[Pair]]:
        """What was kept, the batches of one shape joined; what two pools share stays one tensor."""
        joined: dict[tuple[int, ...], Tensor] = {}

        def join(parts: list[Tensor]) -> Tensor:
            return joined.setdefault(
                tuple(map(id, parts)), torch.cat(parts) if len(parts) > 1 else parts[0]
            )

        found: dict[int, list[Pair]] = {}
        for (number, geometry, _, _), (xs, ys) in self.kept.items():
            x = join(xs)
            if self.centred and number in self.first:
                x = x - self._mean(number, x)
            found.setdefault(number, []).append(Pair(x, join(ys), geometry))
        return found

    def _mean(self, number: int, x: Tensor) -> Tensor:
        """Over all rows, of all ranks."""
        weight, count = self.weights[number], x.new_full((1,), float(x.shape[0]))
        return sum_over_ranks(weight, x.sum(0)) / sum_over_ranks(weight, count)

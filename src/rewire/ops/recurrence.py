"""A recurrent layer through time, with its own backward pass.

Everything is feature-major: states are (size, batch), a sequence is (size, positions) with the
batch of a step contiguous. The input alone may be row-major, if its products go through panels.
Backward goes through time in the other direction. The states of all steps are known by then, so the
gradient of each weight is one product over the whole sequence instead of one per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewire.ops.cells import Cell, State
from rewire.ops.kernels import in_panels, sddmm, spmm
from rewire.ops.layout import for_products, in_runs
from rewire.ops.linear import sparse_linear
from rewire.ops.pairs import Capture, Pair
from rewire.ops.transforms import refuse_transforms, transformed
from rewire.ops.versions import check_versions, remember_versions
from rewire.topology import Index

__all__ = ["Weight", "inference", "recurrence"]

Step = Callable[[int, Tensor, State], State]


class Weight(NamedTuple):
    """A sparse weight as `sparse_linear` takes it."""

    values: Tensor
    bias: Tensor | None
    lists: Index
    capture: Capture | None


def _walk(
    sequence: Tensor, sizes: Sequence[int], reverse: bool, start: State, step: Step
) -> tuple[list[Tensor], State]:
    """Carry a state along a sequence. Returns the first entry of the state after each step, and the
    state that each column ends with.

    In a packed batch the longest sequences come first, so the sequences present at a step are the
    first columns. Forward in time, columns are cut off as sequences end; backward in time, columns
    are added as sequences begin.
    """
    pieces = sequence.split(list(sizes), 1)
    outputs = list(pieces)
    ended: list[State] = []
    order = range(len(sizes) - 1, -1, -1) if reverse else range(len(sizes))
    have = sizes[order[0]]
    state = start if have == start[0].shape[1] else tuple(s[:, :have] for s in start)
    for t in order:
        now = sizes[t]
        if now < have:
            ended.append(tuple(s[:, now:] for s in state))
            state = tuple(s[:, :now] for s in state)
        elif now > have:
            state = tuple(
                torch.cat([s, s0[:, have:now]], 1) for s, s0 in zip(state, start, strict=True)
            )
        have = now
        state = step(t, pieces[t], state)
        outputs[t] = state[0]
    if ended:
        state = tuple(torch.cat(parts, 1) for parts in zip(state, *reversed(ended), strict=True))
    return outputs, state


class _Way(NamedTuple):
    """The arguments of `recurrence` that are not tensors."""

    cell: Cell
    sizes: Sequence[int]
    reverse: bool


def _plain(way: _Way, x: Tensor, start: State, weights: Sequence[Weight]) -> tuple[Tensor, ...]:
    """One direction, in operations that autograd and compilers follow."""
    cell, sizes, reverse = way
    w_ih, w_hh, *projection = weights

    def step(t: int, piece: Tensor, state: State) -> State:
        state = cell.step(piece, sparse_linear(state[0].t(), *w_hh).t(), state)
        for w_hr in projection:
            state = (sparse_linear(state[0].t(), *w_hr).t(), *state[1:])
        return state

    product = sparse_linear(in_runs(x), *w_ih).t()
    outputs, final = _walk(product, sizes, reverse, start, step)
    return torch.cat(outputs, 1), *final


def _flat(weights: Sequence[Weight]) -> list[Tensor | None]:
    return [tensor for w in weights for tensor in (w.values, w.bias, *w.lists)]


def _unflat(tensors: Sequence[Any], captures: Sequence[Capture | None]) -> list[Weight]:
    return [
        Weight(tensors[8 * i], tensors[8 * i + 1], Index(*tensors[8 * i + 2 : 8 * i + 8]), capture)
        for i, capture in enumerate(captures)
    ]


def _forward_product(w: Weight, x: Tensor, panels: bool = False) -> Tensor:
    return spmm(*w.lists[:3], w.values, x.t(), w.bias, panels, runs=True).t()


def _backward_product(w: Weight, g: Tensor, panels: bool = False) -> Tensor:
    return spmm(*w.lists[3:], w.values, g.t(), None, panels).t()


class _Recurrence(torch.autograd.Function):
    """One direction as one Function.

    The arguments behind ``states``, the number of states, are x, the initial states, and of each
    weight its values, its bias and the six tensors of its index.
    """

    @staticmethod
    def forward(
        ctx: Any, way: _Way, captures: Any, states: int, *tensors: Any
    ) -> tuple[Tensor, ...]:
        x, start = tensors[0], tensors[1 : 1 + states]
        weights = _unflat(tensors[1 + states :], captures)
        tape: list[tuple[Tensor, ...]] = [()] * len(way.sizes)
        y, final = _quick(way, x, start, weights, tape)
        ctx.save_for_backward(*tensors, *(tensor for entry in tape for tensor in entry))
        remember_versions(ctx, *(tensor for w in weights for tensor in (w.values, w.lists.row_ptr)))
        ctx.settings = way, captures, states
        ctx.arguments = len(tensors)
        return y, *final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (cell, sizes, reverse), captures, states = ctx.settings
        check_versions(ctx)
        saved = ctx.saved_tensors
        tensors, recorded = saved[: ctx.arguments], saved[ctx.arguments :]
        needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            return (*(None,) * 3, *_differentiable_backward(ctx.settings, tensors, needed, grads))
        weights = _unflat(tensors[1 + states :], captures)
        w_ih, w_hh, *projection = weights
        length = len(recorded) // len(sizes)
        tape = [recorded[t * length : (t + 1) * length] for t in range(len(sizes))]
        of_input, of_hidden, of_projected = ([torch.empty(0)] * len(sizes) for _ in range(3))

        def step(t: int, piece: Tensor, carried: State) -> State:
            g = carried[0] + piece
            of_projected[t] = g
            for w_hr in projection:
                g = _backward_product(w_hr, g)
            state, kept = tape[t][:states], tape[t][states : length - len(projection)]
            of_input[t], of_hidden[t], direct = cell.backward((g, *carried[1:]), state, kept)
            through = _backward_product(w_hh, of_hidden[t])
            if direct[0] is not None:
                through += direct[0]
            return (through, *direct[1:])

        # This goes through time the other way round, so it ends with the gradients of the initial
        # states.
        _, of_start = _walk(grads[0], sizes, not reverse, grads[1:], step)
        g_input = torch.cat(of_input, 1)
        g_hidden = g_input if of_hidden[0] is of_input[0] else torch.cat(of_hidden, 1)
        before = torch.cat([entry[0] for entry in tape], 1)
        pairs = [(w_ih, tensors[0].t(), g_input), (w_hh, before, g_hidden)]
        pairs += [
            (w, torch.cat([entry[-1] for entry in tape], 1), torch.cat(of_projected, 1))
            for w in projection
        ]
        g_x = None
        if needed[0]:
            g_x = _backward_product(w_ih, g_input, in_panels(tensors[0])).t()
        result: list[Tensor | None] = [g_x, *of_start]
        for (w, inputs, g), at in zip(pairs, range(1 + states, len(tensors), 8), strict=True):
            if w.capture is not None and needed[at]:
                w.capture.append(Pair(inputs.t().detach(), g.t()))
            g_values = None
            if needed[at]:
                x, capacity = inputs.t(), w.values.shape[0]
                g_values = sddmm(*w.lists[:3], capacity, g.t(), x, in_panels(x))
            result += [g_values, g.sum(1) if needed[at + 1] else None, *(None,) * 6]
        return (*(None,) * 3, *result)


def _quick(
    way: _Way,
    x: Tensor,
    start: State,
    weights: Sequence[Weight],
    tape: list[tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, State]:
    """One direction without autograd; what backward needs of each step goes to ``tape``, if there
    is one.
    """
    cell, sizes, reverse = way
    w_ih, w_hh, *projection = weights

    def step(t: int, piece: Tensor, state: State) -> State:
        new, kept = cell.forward(piece, _forward_product(w_hh, state[0]), state)
        if tape is not None:
            tape[t] = (*state, *kept, new[0]) if projection else (*state, *kept)
        for w_hr in projection:
            new = (_forward_product(w_hr, new[0]), *new[1:])
        return new

    product = _forward_product(w_ih, x.t(), in_panels(x))
    outputs, final = _walk(product, sizes, reverse, start, step)
    return torch.cat(outputs, 1), final


class _Relay:
    """Holds back the pairs of a backward pass inside a backward pass until the inner one is over.

    A capture tells passes apart, and the pairs of the inner pass belong to the outer one.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._held: list[Pair] | None = []

    def append(self, pair: Pair, /) -> None:
        """As `Capture.append`."""
        if self._held is None:
            self._capture.append(pair)
        else:
            self._held.append(pair)

    def open(self) -> None:
        """Pass on the pairs held back, and from now on every pair at once."""
        held, self._held = self._held or [], None
        for pair in held:
            self._capture.append(pair)


def _differentiable_backward(
    settings: tuple[Any, ...],
    tensors: Sequence[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Backward under ``create_graph=True``: compute forward again in operations that autograd
    follows.
    """
    way, captures, states = settings
    relays = [None if capture is None else _Relay(capture) for capture in captures]
    # Differentiate by views of the arguments: if one argument was computed from another, that path
    # is not part of this Function.
    own = [t.view_as(t) if need else t for t, need in zip(tensors, needed, strict=True)]
    start, weights = tuple(own[1 : 1 + states]), _unflat(own[1 + states :], relays)
    outputs = _plain(way, own[0], start, weights)
    wanted = [t for t, need in zip(own, needed, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    for relay in relays:
        if relay is not None:
            relay.open()
    return [next(found) if need else None for need in needed]


def inference(
    cell: Cell,
    x: Tensor,
    sizes: Sequence[int],
    reverse: bool,
    start: State,
    products: Sequence[Callable[[Tensor], Tensor]],
) -> tuple[Tensor, State]:
    """As `recurrence`, without gradients and for any weights: ``products`` are functions that apply
    those of the input, of the hidden state and, if there is one, of the projection, (positions,
    features) -> (positions, rows), biases included.
    """
    of_input, of_hidden, *projection = products
    advance = cell.step if torch.compiler.is_compiling() else None

    def step(t: int, piece: Tensor, state: State) -> State:
        h = of_hidden(state[0].t()).t()
        new = cell.forward(piece, h, state)[0] if advance is None else advance(piece, h, state)
        for project in projection:
            new = (project(new[0].t()).t(), *new[1:])
        return new

    outputs, final = _walk(of_input(x).t(), sizes, reverse, start, step)
    return torch.cat(outputs, 1), final


def recurrence(
    cell: Cell,
    x: Tensor,
    sizes: Sequence[int],
    reverse: bool,
    start: State,
    weights: Sequence[Weight],
) -> tuple[Tensor, State]:
    """One direction of one recurrent layer.

    Args:
        x: (positions, features); ``sizes[t]`` positions belong to step t, in order, none of the
            sizes increasing.
        reverse: go from the last step to the first.
        start: the initial state, (size, batch) each.
        weights: of the input, of the hidden state and, if there is one, of the projection.

    Returns the hidden states (size, positions) and the final state. Differentiable to any order. A
    capture gets one pair per weight for the whole sequence (under ``create_graph=True``, one per
    step). O(K positions) time. Raises RuntimeError where dtypes differ.
    """
    if not torch.compiler.is_compiling() and transformed():
        raise refuse_transforms()
    for given, what in ((x, "x"), *((s, "an initial state") for s in start)):
        if given.dtype != weights[0].values.dtype:
            raise RuntimeError(
                f"{what} is {given.dtype} but the weight's values are {weights[0].values.dtype}: "
                "convert one, so that both agree"
            )
    x, way = for_products(x), _Way(cell, sizes, reverse)
    if torch.compiler.is_compiling():
        y, *final = _plain(way, x, start, weights)
        return y, tuple(final)
    if not torch.is_grad_enabled():
        return _quick(way, x, start, weights)
    captures = [w.capture for w in weights]
    arguments = (way, captures, len(start), x, *start, *_flat(weights))
    y, *final = _Recurrence.apply(*arguments)  # type: ignore[no-untyped-call]
    return y, tuple(final)

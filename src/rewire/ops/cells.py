"""One step of a recurrent layer: the cells of Elman's network, GRU and LSTM, and their gradients.

Everything is feature-major: states are (size, batch), products (gates, batch).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["GRU", "LSTM", "RELU", "TANH", "Cell", "State"]

#: What goes from step to step, each (size, batch): the hidden state, and for an LSTM the cell
#: state.
State = tuple[Tensor, ...]


class Cell(Protocol):
    """One step, from the products with the input and with the hidden state, (gates, batch) each."""

    def step(self, x: Tensor, h: Tensor, state: State) -> State:
        """The next state (its first entry before a projection), in operations that autograd
        follows.
        """

    def forward(self, x: Tensor, h: Tensor, state: State) -> tuple[State, State]:
        """The same without autograd: the next state, and what `backward` needs; may overwrite
        ``h``.
        """

    def backward(
        self, grads: State, state: State, kept: State
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """From the gradients of the next state, those of x, of h, and of ``state`` (without what
        passes through h).
        """


def _cut(tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    size = tensor.shape[0] // parts
    return tuple(tensor[i * size : (i + 1) * size] for i in range(parts))


class _Elman:
    """h' = f(x + h), where f is tanh or relu."""

    def __init__(self, tanh: bool) -> None:
        self._tanh = tanh

    def step(self, x: Tensor, h: Tensor, state: State) -> State:
        total = x + h
        return (total.tanh() if self._tanh else total.relu(),)

    def forward(self, x: Tensor, h: Tensor, state: State) -> tuple[State, State]:
        total = h.add_(x)
        new = total.tanh_() if self._tanh else total.relu_()
        return (new,), (new,)

    def backward(
        self, grads: State, state: State, kept: State
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        if self._tanh:
            g = torch.ops.aten.tanh_backward(grads[0], kept[0])
        else:
            g = torch.ops.aten.threshold_backward(grads[0], kept[0], 0)
        return g, g, (None,)


class _GRU:
    """r, z = sigmoid(x + h); n = tanh(x_n + r h_n); h' = n + z (h - n)."""

    def step(self, x: Tensor, h: Tensor, state: State) -> State:
        gates = x.shape[0] // 3 * 2
        reset, update = (x[:gates] + h[:gates]).sigmoid().chunk(2)
        new = torch.addcmul(x[gates:], reset, h[gates:]).tanh()
        return (torch.lerp(new, state[0], update),)

    def forward(self, x: Tensor, h: Tensor, state: State) -> tuple[State, State]:
        gates = x.shape[0] // 3 * 2
        h[:gates].add_(x[:gates]).sigmoid_()
        reset, update, h_new = _cut(h, 3)
        new = torch.addcmul(x[gates:], reset, h_new).tanh_()
        return (torch.lerp(new, state[0], update),), (h, new)

    def backward(
        self, grads: State, state: State, kept: State
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        (g,), (h, new) = grads, kept
        reset, update, h_new = _cut(h, 3)
        gates = 2 * reset.shape[0]
        g_x = torch.empty_like(h)
        g_reset, g_update, g_new = _cut(g_x, 3)
        carried = g * update
        torch.sub(g, carried, out=g_new)
        torch.ops.aten.tanh_backward(g_new, new, grad_input=g_new)
        torch.mul(g_new, h_new, out=g_reset)
        torch.sub(state[0], new, out=g_update).mul_(g)
        torch.ops.aten.sigmoid_backward(g_x[:gates], h[:gates], grad_input=g_x[:gates])
        g_h = g_x.clone()
        g_h[gates:].mul_(reset)
        return g_x, g_h, (carried,)


class _LSTM:
    """i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of x + h; c' = f c + i g; h' = o tanh(c')."""

    def step(self, x: Tensor, h: Tensor, state: State) -> State:
        enter, forget, new, leave = (x + h).chunk(4)
        cell = torch.addcmul(forget.sigmoid() * state[1], enter.sigmoid(), new.tanh())
        return leave.sigmoid() * cell.tanh(), cell

    def forward(self, x: Tensor, h: Tensor, state: State) -> tuple[State, State]:
        h.add_(x)
        enter, forget, new, leave = _cut(h, 4)
        h[: 2 * enter.shape[0]].sigmoid_()
        new.tanh_()
        leave.sigmoid_()
        cell = (forget * state[1]).addcmul_(enter, new)
        squashed = cell.tanh()
        return (leave * squashed, cell), (h, squashed)

    def backward(
        self, grads: State, state: State, kept: State
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        (g, g_cell), (h, squashed) = grads, kept
        enter, forget, new, leave = _cut(h, 4)
        g_h = torch.empty_like(h)
        g_enter, g_forget, g_new, g_leave = _cut(g_h, 4)
        g_cell = torch.ops.aten.tanh_backward(g * leave, squashed).add_(g_cell)
        torch.mul(g, squashed, out=g_leave)
        torch.mul(g_cell, new, out=g_enter)
        torch.mul(g_cell, state[1], out=g_forget)
        torch.mul(g_cell, enter, out=g_new)
        half = 2 * enter.shape[0]
        torch.ops.aten.sigmoid_backward(g_h[:half], h[:half], grad_input=g_h[:half])
        torch.ops.aten.tanh_backward(g_new, new, grad_input=g_new)
        torch.ops.aten.sigmoid_backward(g_leave, leave, grad_input=g_leave)
        return g_h, g_h, (None, g_cell.mul_(forget))


TANH: Cell = _Elman(tanh=True)
RELU: Cell = _Elman(tanh=False)
GRU: Cell = _GRU()
LSTM: Cell = _LSTM()

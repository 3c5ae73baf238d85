"""`SparseRNN`, `SparseLSTM`, `SparseGRU`: the twins of PyTorch's recurrent layers with a connection
budget.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rewire.nn.layers.allot import Connections, Density
from rewire.nn.layers.initial import Init
from rewire.nn.layers.recurrent_base import Form, Recurrent
from rewire.ops.cells import GRU, LSTM, RELU, TANH, Cell

__all__ = ["SparseGRU", "SparseLSTM", "SparseRNN"]


_SHARED = """
    Arguments are those of `torch.nn.{twin}`, plus:
        connections, density: the budget, exactly one of them. A number counts for all weights
            together and is spread over them by ``distribution``; a list (in the order of
            `weight_shapes`) or a dict (by weight name) has one for each.
        distribution: "erk", "er" or "uniform", see `rewire.budget`.
        generator: draws topology, values and biases; torch's default generator otherwise.
        init: how large the first values are: "auto", "dense" or "sparse", see `reset_parameters`.

    Every ``weight_*`` (all gates stacked, as in PyTorch) is a `SparseWeight`; biases are as in
    PyTorch. Takes and returns what the twin does: (time, batch, features), (batch, time, features),
    (time, features) or a packed sequence, and states of (layers x directions, batch, size). Equal
    to the twin with the weights of ``to_dense()`` up to rounding (dropout draws other numbers).
    Under autocast results have autocast's dtype; values, states and sums keep the weight's dtype.
    Raises RuntimeError for shapes that do not fit.

    Cost: O(K time batch) in each of the three products. The product with the inputs of a layer is
    one over all time; that with the hidden state is one per step, without copies.
"""


class _OneState(Recurrent):
    """A layer whose only state is its output."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """(time, batch, input_size) -> output (time, batch, directions x hidden_size), h_n."""
        y, states = self._forward(input, None if hx is None else (hx,))
        return y, states[0]


class SparseRNN(_OneState):
    __doc__ = f"""``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``, or relu, with a connection budget.
{_SHARED.format(twin="RNN")}"""

    gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        connections: Connections | None = None,
        density: Density | None = None,
        distribution: str = "erk",
        generator: torch.Generator | None = None,
        init: Init = "auto",
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', not {nonlinearity!r}")
        options = bias, batch_first, dropout, bidirectional, 0
        form = Form(input_size, hidden_size, num_layers, *options)
        super().__init__(form, connections, density, distribution, generator, init, device, dtype)
        self.nonlinearity = nonlinearity

    def _cell(self) -> Cell:
        return TANH if self.nonlinearity == "tanh" else RELU


class SparseGRU(_OneState):
    __doc__ = f"""``h' = (1 - z) n + z h`` with reset, update and new gates
    r, z, n, with a connection budget.
{_SHARED.format(twin="GRU")}"""

    gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        connections: Connections | None = None,
        density: Density | None = None,
        distribution: str = "erk",
        generator: torch.Generator | None = None,
        init: Init = "auto",
    ) -> None:
        options = bias, batch_first, dropout, bidirectional, 0
        form = Form(input_size, hidden_size, num_layers, *options)
        super().__init__(form, connections, density, distribution, generator, init, device, dtype)

    def _biases(self, suffix: str) -> tuple[Tensor | None, Tensor | None]:
        # The reset gate multiplies the hidden part of the third gate, bias included, so the two
        # cannot be summed.
        if not self.bias:
            return None, None
        return getattr(self, f"bias_ih_{suffix}"), getattr(self, f"bias_hh_{suffix}")

    def _cell(self) -> Cell:
        return GRU


class SparseLSTM(Recurrent):
    __doc__ = f"""``c' = f c + i g``, ``h' = o tanh(c')`` with gates i, f, g, o, with a
    connection budget.
{_SHARED.format(twin="LSTM")}"""

    gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        connections: Connections | None = None,
        density: Density | None = None,
        distribution: str = "erk",
        generator: torch.Generator | None = None,
        init: Init = "auto",
    ) -> None:
        options = bias, batch_first, dropout, bidirectional, proj_size
        form = Form(input_size, hidden_size, num_layers, *options)
        super().__init__(form, connections, density, distribution, generator, init, device, dtype)

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """(time, batch, input_size) -> output (time, batch, directions x output_size), (h_n,
        c_n).
        """
        y, states = self._forward(input, hx)
        return y, (states[0], states[1])

    def _states(self) -> tuple[int, ...]:
        return self.output_size, self.hidden_size

    def _cell(self) -> Cell:
        return LSTM

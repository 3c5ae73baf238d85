"""What the recurrent layers share: weights, layers, directions, packed sequences.

Inside, a sequence is one (features, positions) matrix, time slowest and batch fastest. In this
layout the product with all inputs at once, the steps cut out of it, every hidden state and the
next layer need no copies.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rewire import ops
from rewire.nn.layers.allot import Connections, Density, allot
from rewire.nn.layers.base import autocast_dtype
from rewire.nn.layers.initial import Init, check_init, draw_values
from rewire.nn.weight.pool import SparseWeight
from rewire.nn.weight.twin import Twin
from rewire.ops.cells import Cell, State
from rewire.ops.recurrence import Weight, recurrence

__all__ = ["Form", "Recurrent"]


class Form(NamedTuple):
    """The arguments that a recurrent layer shares with its twin in PyTorch."""

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int


class Recurrent(Twin):
    """What the three layers share; a subclass adds its cell."""

    #: The number of gates, whose weights are stacked in one matrix.
    gates: int

    def __init__(
        self,
        form: Form,
        connections: Connections | None,
        density: Density | None,
        distribution: str,
        generator: torch.Generator | None,
        init: Init,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name in ("input_size", "hidden_size", "num_layers"):
            size = getattr(form, name)
            if int(size) != size or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {size}")
        hidden_size, proj_size, dropout = form.hidden_size, form.proj_size, form.dropout
        if not 0 <= proj_size < hidden_size:
            raise ValueError(
                f"proj_size must be 0 (no projection) or below hidden_size={hidden_size}, not "
                f"{proj_size}"
            )
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability between 0 and 1, not {dropout}")
        if dropout and form.num_layers == 1:
            warnings.warn(
                f"dropout={dropout} has no effect with num_layers=1: it acts between layers",
                stacklevel=3,
            )
        self.input_size, self.hidden_size, self.num_layers = form[:3]
        self.bias, self.batch_first, self.dropout = form.bias, form.batch_first, float(dropout)
        self.bidirectional, self.proj_size = form.bidirectional, proj_size
        shapes = self.weight_shapes()
        for name, count in allot(shapes, connections, density, distribution).items():
            weight = SparseWeight(
                shapes[name], count, generator=generator, device=device, dtype=dtype
            )
            setattr(self, name, weight)
        for name in self.bias_names():
            blank = torch.zeros(self.gates * hidden_size, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(blank))
        self.reset_parameters(generator, init=init)

    # --- its parts --------------------------------------------------------------------------------

    @property
    def output_size(self) -> int:
        """Features of the output: proj_size if there is a projection, else hidden_size."""
        return self.proj_size or self.hidden_size

    def _suffixes(self) -> list[str]:
        """The ends of PyTorch's parameter names, layer by layer."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def weight_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the sparse weights by name, in PyTorch's order (the order of a budget given as
        a list).
        """
        shapes: dict[str, tuple[int, int]] = {}
        rows, later = self.gates * self.hidden_size, self.output_size * (1 + self.bidirectional)
        for suffix in self._suffixes():
            inputs = self.input_size if suffix in ("l0", "l0_reverse") else later
            shapes[f"weight_ih_{suffix}"] = (rows, inputs)
            shapes[f"weight_hh_{suffix}"] = (rows, self.output_size)
            if self.proj_size:
                shapes[f"weight_hr_{suffix}"] = (self.proj_size, self.hidden_size)
        return shapes

    def bias_names(self) -> list[str]:
        """Names of the biases; empty with ``bias=False``."""
        suffixes = self._suffixes() if self.bias else []
        return [f"bias_{kind}_{suffix}" for suffix in suffixes for kind in ("ih", "hh")]

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator | None = None, *, init: Init = "auto"
    ) -> None:
        """Draw biases as PyTorch does, U(-b, b) with b = 1 / sqrt(hidden_size), and values; the
        topology stays.

        Values of the dense twin have the same b. ``init``: how it depends on the number of
        connections here, see `rewire.nn.layers.initial.draw_values`.
        """
        self._reset(generator, init, biases=True)

    @torch.no_grad()
    def reset_weights(
        self, generator: torch.Generator | None = None, *, init: Init = "auto"
    ) -> None:
        """As `reset_parameters`, but biases stay."""
        self._reset(generator, init, biases=False)

    def _reset(self, generator: torch.Generator | None, init: Init, biases: bool) -> None:
        check_init(init)
        bound = 1 / math.sqrt(self.hidden_size)
        pools: dict[int, SparseWeight] = {}
        for name in self.weight_shapes():
            weight = self.get_submodule(name)
            assert isinstance(weight, SparseWeight)
            pools[id(weight.values)] = weight
            if weight.device.type != "meta" and not weight.drawn:
                weight.draw(generator)
        for parameter in self.parameters():
            if parameter.device.type == "meta":
                continue
            pool = pools.get(id(parameter))
            if pool is not None:
                draw_values(pool, bound, init, generator)
            elif biases:
                parameter.uniform_(-bound, bound, generator=generator)

    def flatten_parameters(self) -> None:
        """Does nothing; models written for PyTorch's recurrent layers call it."""

    def extra_repr(self) -> str:
        defaults = Form(self.input_size, self.hidden_size, 1, True, False, 0.0, False, 0)._asdict()
        given = {name: getattr(self, name) for name in defaults}
        parts = [f"{name}={value}" for name, value in given.items() if value != defaults[name]]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *parts])

    # --- forward ----------------------------------------------------------------------------------

    def _states(self) -> tuple[int, ...]:
        """Sizes of the states that go from step to step."""
        return (self.output_size,)

    def _cell(self) -> Cell:
        raise NotImplementedError

    def _biases(self, suffix: str) -> tuple[Tensor | None, Tensor | None]:
        """The biases of the product with all inputs, and of the product of each step.

        If both are only added, the first gets their sum, so that it is added once, not in each
        step.
        """
        if not self.bias:
            return None, None
        return getattr(self, f"bias_ih_{suffix}") + getattr(self, f"bias_hh_{suffix}"), None

    def _forward(
        self, x: Tensor | PackedSequence, initial: State | None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Output and final states, shaped as in PyTorch: the states are (layers x directions,
        batch, size).
        """
        data = x.data if isinstance(x, PackedSequence) else x
        weight = cast(SparseWeight, self.weight_ih_l0)
        narrow = autocast_dtype(data, weight)
        if narrow is not None:
            wide = weight.dtype
            with torch.autocast(data.device.type, enabled=False):
                initial = initial and tuple(s.to(wide) for s in initial)
                y, states = self._sequence(x.to(wide), initial)
            return y.to(narrow), tuple(s.to(narrow) for s in states)
        return self._sequence(x, initial)

    def _sequence(
        self, x: Tensor | PackedSequence, initial: State | None
    ) -> tuple[Tensor | PackedSequence, State]:
        if isinstance(x, PackedSequence):
            sizes: list[int] = x.batch_sizes.tolist()
            _check_input(x.data, (2,), self.input_size)
            if initial is not None and x.sorted_indices is not None:
                initial = tuple(s.index_select(1, x.sorted_indices) for s in initial)
            y, states = self._layers(x.data, sizes, initial)
            packed = PackedSequence(y, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
            if x.unsorted_indices is not None:
                states = tuple(s.index_select(1, x.unsorted_indices) for s in states)
            return packed, states
        _check_input(x, (2, 3), self.input_size)
        batched = x.dim() == 3
        if initial is not None and any(s.dim() != x.dim() for s in initial):
            given = ", ".join(f"{s.dim()}-D" for s in initial)
            raise RuntimeError(f"a {x.dim()}-D input needs {x.dim()}-D initial states, not {given}")
        if not batched:
            x, initial = x.unsqueeze(1), initial and tuple(s.unsqueeze(1) for s in initial)
        elif self.batch_first:
            x = x.transpose(0, 1)
        length, batch = x.shape[:2]
        if not length:
            raise RuntimeError("the sequence has no steps")
        x = x.reshape(length * batch, self.input_size)
        y, states = self._layers(x, [batch] * length, initial)
        y = y.view(length, batch, y.shape[1])
        if not batched:
            return y.squeeze(1), tuple(s.squeeze(1) for s in states)
        return (y.transpose(0, 1) if self.batch_first else y), states

    def _layers(self, x: Tensor, sizes: list[int], initial: State | None) -> tuple[Tensor, State]:
        """All layers over (positions, features); ``sizes[t]`` positions belong to step t."""
        suffixes = self._suffixes()
        directions = 2 if self.bidirectional else 1
        shapes = [(len(suffixes), sizes[0], size) for size in self._states()]
        if initial is None:
            initial = tuple(x.new_zeros(shape) for shape in shapes)
        if [tuple(s.shape) for s in initial] != shapes:
            given = [tuple(s.shape) for s in initial]
            raise RuntimeError(f"initial states must have the shapes {shapes}, not {given}")
        starts = [state.unbind(0) for state in initial]
        sequence = x
        final: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for place in range(layer * directions, (layer + 1) * directions):
                start = tuple(state[place].t() for state in starts)
                output, last = self._direction(sequence, sizes, start, suffixes[place])
                outputs.append(output)
                final.append(last)
            output = torch.cat(outputs) if self.bidirectional else outputs[0]
            if self.dropout and layer + 1 < self.num_layers:
                output = nn.functional.dropout(output, self.dropout, self.training)
            sequence = output.t()
        states = tuple(torch.stack([s.t() for s in column]) for column in zip(*final, strict=True))
        return ops.in_rows(sequence), states

    def _weight(self, name: str, bias: Tensor | None) -> Weight:
        weight = self._modules[name]
        assert isinstance(weight, SparseWeight)
        values, index = weight.operand()
        return Weight(values, bias, index, weight.capture)

    def _direction(
        self, x: Tensor, sizes: list[int], initial: State, suffix: str
    ) -> tuple[Tensor, State]:
        """One direction of one layer: (positions, features) -> (output_size, positions), and the
        final state.
        """
        b_ih, b_hh = self._biases(suffix)
        named = [("ih", b_ih), ("hh", b_hh)]
        if self.proj_size:
            named.append(("hr", None))
        weights = [self._weight(f"weight_{kind}_{suffix}", bias) for kind, bias in named]
        return recurrence(self._cell(), x, sizes, suffix.endswith("_reverse"), initial, weights)


def _check_input(x: Tensor, dims: tuple[int, ...], features: int) -> None:
    if x.dim() not in dims or x.shape[-1] != features:
        kinds = " or ".join(f"{d}-D" for d in dims)
        raise RuntimeError(
            f"the input must be {kinds} with {features} features last, not of shape "
            f"{tuple(x.shape)}"
        )

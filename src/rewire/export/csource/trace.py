"""Follows a network on an example, and makes the plan of it: `torch.fx` finds the operations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rewire.export.csource import kernels
from rewire.export.csource.call import Call, Refused
from rewire.export.csource.curves import per_channel
from rewire.export.csource.operators import FUNCTIONS, METHODS, MODULES
from rewire.export.csource.plan import Buffer, Matrix, Plan, smallest
from rewire.export.folding import affine
from rewire.nn.frozen.quantize import Values
from rewire.nn.frozen.weight import FrozenWeight
from rewire.nn.layers.conv import SparseConv1d, SparseConv2d
from rewire.nn.layers.linear import SparseLinear
from rewire.nn.layers.recurrent import SparseGRU, SparseLSTM, SparseRNN
from rewire.nn.weight.twin import Twin

__all__ = ["plan_of"]

_LINEAR = nn.Linear | SparseLinear
_CONV = nn.Conv1d | nn.Conv2d | SparseConv1d | SparseConv2d
_RECURRENT = nn.RNN | nn.GRU | nn.LSTM | SparseRNN | SparseGRU | SparseLSTM


class _Tracer(fx.Tracer):
    """Sees the layers of torch.nn and of rewire as one operation each."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, Twin) or type(m) in MODULES
        return known or super().is_leaf_module(m, module_qualified_name)


def plan_of(model: nn.Module, example: Tensor, values: Values) -> tuple[Plan, Tensor]:
    """The plan of a frozen model, and what it computes for the example.

    Raises `Refused` (a ValueError) for what cannot be written in C, by its name in the model.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise Refused(
            f"the model cannot be exported to C: torch.fx cannot follow it ({reason}); its forward "
            "must take one tensor and must not decide by what is in it"
        ) from None
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise Refused("the model cannot be exported to C: it must take exactly one tensor")
    walk = _Walk(fx.GraphModule(model, graph), values)
    with torch.no_grad():
        result = walk.run(example)
    walk.finish(result)
    return walk.plan, result


class _Walk(fx.Interpreter):
    """Runs the graph on the example, and adds a step for each operation."""

    def __init__(self, module: fx.GraphModule, values: Values) -> None:
        super().__init__(module)
        self.plan = Plan()
        self._values = values
        self._buffers: dict[int, Buffer] = {}
        self._alive: list[Any] = []  # buffers are found by the id of a tensor, which must live on
        self._folded: dict[fx.Node, Matrix] = {}
        self._names: set[str] = set()

    def finish(self, result: Any) -> None:
        """Say where the result is."""
        if not isinstance(result, Tensor) or id(result) not in self._buffers:
            raise Refused("the model cannot be exported to C: it must return one tensor of floats")
        last, plan = self._buffers[id(result)], self.plan
        if last.place == "input":
            made = plan.buffer(result, error=last.error)
            helper = Call(plan, "", (), {}, {}, result).helper("copy", kernels.COPY)
            size = f"(const long[]){{{made.size}}}, (const long[]){{1}}, 1"
            plan.add(f"{helper}($0, 0L, {size}, $1, {made.size}L);", (last, made))
            last = made
        last.place = "output"
        plan.result = last
        plan.place()

    def run_node(self, n: fx.Node) -> Any:
        result: Any = super().run_node(n)
        self._alive.append(result)
        if n.op == "placeholder":
            if not isinstance(result, Tensor) or result.dtype != torch.float32:
                raise Refused("the model cannot be exported to C: its input must be float32")
            self._buffers[id(result)] = self.plan.buffer(result, place="input")
        elif n.op == "get_attr":
            raise Refused(
                f"{n.target} cannot be exported to C: it is a parameter or buffer that the model "
                "uses outside of a layer"
            )
        elif n.op.startswith("call_") and not _is_plain(result):
            self._step(n, result)
        return result

    # --- one operation ----------------------------------------------------------------------------

    def _step(self, n: fx.Node, result: Any) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        title = str(n.target) if n.op != "call_function" else _function_name(n.target)
        call = Call(self.plan, title, tuple(args), dict(kwargs), self._buffers, result)
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            call.name = f"{n.target} ({type(module).__name__})"
            made = self._module(n, call, module)
        else:
            table: Any = FUNCTIONS if n.op == "call_function" else METHODS
            if title == "getitem" and isinstance(args[0], tuple | list):
                return  # of the results of a recurrent layer, whose buffers are known
            handle = table.get(n.target)
            if handle is None:
                raise call.refuse("there is no C for it")
            others = {name: given for name, given in kwargs.items() if name != "input"}
            call.plan_view = lambda places: _apply(n, (places, *args[1:]), others)
            made = handle(call)
        if made is not None:
            self._buffers[id(result)] = made
            if isinstance(result, Tensor) and result.numel() and result.isfinite().all():
                made.largest = float(result.abs().max())

    def _module(self, n: fx.Node, call: Call, module: nn.Module) -> Buffer | None:
        norms = (WeightNorm, SpectralNorm)  # their hooks only make the weight, which is there
        pre_hooks = module._forward_pre_hooks.values()
        if module._forward_hooks or not all(isinstance(hook, norms) for hook in pre_hooks):
            raise call.refuse("it has a forward hook, which would be left out")
        if isinstance(module, _LINEAR):
            return self._linear(n, call, module)
        if isinstance(module, _CONV):
            return self._conv(n, call, module)
        if isinstance(module, _RECURRENT):
            self._recurrent(n, call, module)
            return None
        if isinstance(module, _BatchNorm):
            if n.all_input_nodes[0] in self._folded:
                return call.source
            factor, shift = _affine(call, module)
            inner = math.prod(call.x.shape[2:])
            numbers = {"factor": factor, "shift": shift}
            return per_channel(call, numbers, inner, "v * factor + shift")
        handle = MODULES.get(type(module))
        if handle is None:
            raise call.refuse("there is no C for layers of this type")
        return handle(call, module)

    # --- layers with weights ----------------------------------------------------------------------

    def _matrix(self, title: str, weight: Any, bias: Tensor | None) -> Matrix:
        name = "w_" + "".join(c if c.isalnum() else "_" for c in title.removesuffix(".weight"))
        while name in self._names:
            name += "_"
        self._names.add(name)
        wide = None if bias is None else bias.detach().double()
        if not isinstance(weight, FrozenWeight):
            shape = (weight.shape[0], math.prod(weight.shape[1:]))
            rows = torch.arange(shape[0]).repeat_interleave(shape[1])
            numbers = weight.detach().double().flatten()
            return Matrix(name, title, rows, None, numbers, shape, wide)
        rows, cols, numbers = weight.coo()
        made = Matrix(name, title, rows, cols, numbers.double(), weight.matrix_shape, wide)
        if weight.scale is not None:
            scale = weight.scale.double()
            codes = weight.values if weight.values is not None else numbers.sign().to(torch.int8)
            made.values, made.scale, made.stored = codes, scale, weight.stored
            made.error, made.bound = weight.error, weight.bound
        return made

    def _fold(self, n: fx.Node, call: Call, matrix: Matrix) -> None:
        """Follow the matrix by the BatchNorm that alone reads its result, and round it."""
        users = list(n.users)
        if len(users) == 1 and users[0].op == "call_module":
            norm = self.fetch_attr(str(users[0].target))
            # Of more than two dimensions a linear layer changes the last, and a norm the second.
            same = isinstance(call.result, Tensor) and (
                call.result.dim() == 2 or isinstance(self.fetch_attr(str(n.target)), _CONV)
            )
            if isinstance(norm, _BatchNorm) and len(users[0].all_input_nodes) == 1 and same:
                matrix.times(*_affine(call, norm))
                self._folded[n] = matrix
        matrix.round(self._values)
        self.plan.matrices.append(matrix)

    def _weights(self, matrix: Matrix, make: Any) -> tuple[str, str]:
        """The helper for a matrix, and the arguments that name its arrays."""
        values = {"float": "float", "int8": "int8_t", "ternary": ""}[matrix.stored]
        ptr = cols = ""
        if matrix.cols is not None:
            ptr = smallest(matrix.values.numel())
            cols = smallest(matrix.shape[1] - 1)
        name, text = make(ptr, cols, values)
        arrays = [f"@{matrix.name}_{part}" for part in ("ptr", "cols") if cols]
        arrays += [f"@{matrix.name}_values"] if values else []
        arrays.append("0" if matrix.scale is None else f"@{matrix.name}_scale")
        arrays.append("0" if matrix.bias is None else f"@{matrix.name}_bias")
        return Call(self.plan, "", (), {}, {}, None).helper(name, text), ", ".join(arrays)

    @staticmethod
    def _error(matrix: Matrix, source: Buffer) -> float | None:
        if source.error is None:
            return None
        # `largest` may be that of rounded floats, and so the exact ones may exceed it by the error
        return matrix.bound * (source.largest + source.error) + matrix.norm() * source.error

    def _linear(self, n: fx.Node, call: Call, layer: Any) -> Buffer:
        matrix = self._matrix(str(n.target), layer.weight, layer.bias)
        self._fold(n, call, matrix)
        helper, arrays = self._weights(matrix, kernels.linear)
        rows, features = matrix.shape
        count = call.x.numel() // features
        made = call.output(self._error(matrix, call.source))
        code = f"{helper}({arrays}, {rows}L, {features}L, {count}L, $0, $1);"
        self.plan.add(code, (call.source, made))
        self.plan.multiply_adds += matrix.values.numel() * count
        return made

    def _conv(self, n: fx.Node, call: Call, layer: Any) -> Buffer:
        if layer.padding_mode != "zeros":
            raise call.refuse(f"it pads by {layer.padding_mode!r}, and C is written for zeros only")
        rank = len(layer.kernel_size)
        if call.x.dim() != rank + 2:
            raise call.refuse("its input has no batch dimension")
        matrix = self._matrix(str(n.target), layer.weight, layer.bias)
        self._fold(n, call, matrix)
        helper, arrays = self._weights(matrix, kernels.conv)
        made = call.output(self._error(matrix, call.source))

        def two(given: Any, other: int) -> list[int]:
            return [*[other] * (2 - rank), *given]

        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding = layer.padding
        if isinstance(padding, str):
            padding = [r // 2 if padding == "same" else 0 for r in reach]
        x, y = call.x, call.result
        shape = [x.shape[0], layer.groups, x.shape[1] // layer.groups, *two(x.shape[2:], 1)]
        shape += [y.shape[1], *two(layer.kernel_size, 1), *two(y.shape[2:], 1)]
        shape += [*two(layer.stride, 1), *two(layer.dilation, 1), *two(padding, 0)]
        numbers = ", ".join(map(str, shape))
        code = f"{helper}({arrays}, (const int[]){{{numbers}}}, $0, $1);"
        self.plan.add(code, (call.source, made))
        positions = x.shape[0] * math.prod(y.shape[2:])
        self.plan.multiply_adds += matrix.values.numel() * positions
        return made

    def _recurrent(self, n: fx.Node, call: Call, layer: Any) -> None:
        if len(call.args) + len(call.kwargs) > 1:
            raise call.refuse("it is given an initial state, and C is written for zeros")
        if layer.proj_size:
            raise call.refuse("it has a projection (proj_size)")
        y, states = call.result
        states = states if isinstance(states, tuple) else (states,)
        kind = "lstm" if isinstance(layer, nn.LSTM | SparseLSTM) else "gru"
        if isinstance(layer, nn.RNN | SparseRNN):
            kind = f"rnn_{layer.nonlinearity}"
        plan, x, hidden = self.plan, call.x, layer.hidden_size
        if x.dim() == 3 and layer.batch_first:
            batch, length = x.shape[:2]
            step, sample = 1, length  # positions from a step, and from a sample, to the next
        else:
            length, batch = x.shape[0], x.shape[1] if x.dim() == 3 else 1
            step, sample = batch, 1
        ways = 2 if layer.bidirectional else 1
        unknown: Any = 0.0 if self._exact() else None
        kept = [plan.buffer(state, error=unknown) for state in states]
        for state, buffer in zip(states, kept, strict=True):
            self._buffers[id(state)] = buffer
        cell = call.helper(kind, kernels.CELLS[kind], math=True)
        gates = {"lstm": 4, "gru": 3}.get(kind, 1) * hidden
        room = [plan.buffer(torch.zeros(gates)) for _ in range(2)]
        sequence, features = call.source, x.shape[-1]
        for number in range(layer.num_layers):
            out = plan.buffer(y.new_zeros(y.numel()), error=unknown)
            for way in range(ways):
                suffix = f"l{number}" + ("_reverse" if way else "")
                helpers = []
                for part in ("ih", "hh"):
                    title = f"{n.target}.weight_{part}_{suffix}"
                    bias = getattr(layer, f"bias_{part}_{suffix}") if layer.bias else None
                    matrix = self._matrix(title, getattr(layer, f"weight_{part}_{suffix}"), bias)
                    matrix.round(self._values)
                    plan.matrices.append(matrix)
                    helpers.append((*self._weights(matrix, kernels.linear), matrix.shape[1]))
                    plan.multiply_adds += matrix.values.numel() * length * batch
                place = (number * ways + way) * batch * hidden
                (of_x, x_arrays, _), (of_h, h_arrays, _) = helpers
                cells = f"$4 + {place}L + b * {hidden}L" if kind == "lstm" else "0"
                plan.add(
                    f"for (long i = 0; i < {batch * hidden}L; ++i) {{\n"
                    f"    $3[{place}L + i] = 0.0f;\n"
                    + (f"    $4[{place}L + i] = 0.0f;\n" if kind == "lstm" else "")
                    + f"  }}\n  for (long k = 0; k < {length}L; ++k)\n"
                    f"    for (long b = 0; b < {batch}L; ++b) {{\n"
                    f"      const long at = {f'{length - 1}L - k' if way else 'k'};\n"
                    f"      const long position = at * {step}L + b * {sample}L;\n"
                    f"      float *h = $3 + {place}L + b * {hidden}L;\n"
                    f"      {of_x}({x_arrays}, {gates}L, {features}L, 1L,\n"
                    f"          $0 + position * {features}L, $1);\n"
                    f"      {of_h}({h_arrays}, {gates}L, {hidden}L, 1L, h, $2);\n"
                    f"      {cell}($1, $2, h, {cells}, {hidden}L);\n"
                    f"      for (long i = 0; i < {hidden}L; ++i)\n"
                    f"        ${len(kept) + 3}[position * {ways * hidden}L + {way * hidden}L + i]"
                    " = h[i];\n    }",
                    (sequence, *room, *kept, out),
                )
            sequence, features = out, ways * hidden
        self._buffers[id(y)] = sequence

    def _exact(self) -> bool:
        """Whether all weights are written as they are."""
        frozen = any(
            isinstance(m, FrozenWeight) and m.scale is not None for m in self.module.modules()
        )
        return self._values == "float" and not frozen


def _affine(call: Call, norm: Any) -> tuple[Tensor, Tensor]:
    found = affine(norm)
    if found is None:
        raise call.refuse(f"a {type(norm).__name__} without running statistics depends on a batch")
    return found


def _is_plain(value: Any) -> bool:
    """Whether there are no tensors in a value: sizes and the like, which are constants here."""
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return all(_is_plain(part) for part in value)
    return not isinstance(value, Tensor)


def _function_name(function: Any) -> str:
    return str(getattr(function, "__name__", function))


def _apply(n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if n.op == "call_method":
        return getattr(args[0], str(n.target))(*args[1:], **kwargs)
    function: Any = n.target
    return function(*args, **kwargs)

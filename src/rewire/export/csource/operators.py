"""Which operations of PyTorch can be written in C, and the step that each becomes."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewire.export.csource import kernels
from rewire.export.csource.call import Call, Handler, ModuleHandler
from rewire.export.csource.curves import (
    CURVES,
    clamped,
    curve,
    curve_function,
    curve_module,
    prelu,
    srelu,
)
from rewire.export.csource.plan import Buffer, c_float
from rewire.nn.layers.srelu import SReLU

__all__ = ["FUNCTIONS", "METHODS", "MODULES"]


# --- shapes ---------------------------------------------------------------------------------------


def _same(call: Call) -> Buffer:
    """The same floats in the same order. Buffers are row-major, so views are no other floats."""
    return call.source


def _copied(call: Call) -> Buffer:
    """Floats of the input in another order: permute, transpose, indexing with numbers and slices.

    PyTorch applies the same operation to the places of the floats, and the result is read off.
    """
    x = call.x
    places = torch.arange(x.numel()).view(x.shape)
    view = call.plan_view(places)
    if not isinstance(view, Tensor):
        raise call.refuse("its result is no tensor")
    if view.untyped_storage().data_ptr() != places.untyped_storage().data_ptr():
        raise call.refuse("it picks floats by a list or a mask, not by numbers and slices")
    shape, stride = list(view.shape), list(view.stride())
    made = call.output(call.source.error)
    if view.is_contiguous() and view.storage_offset() == 0 and made.size == call.source.size:
        return call.source
    if not shape:
        shape, stride = [1], [1]
    sizes, steps = (f"(const long[]){{{', '.join(map(str, given))}}}" for given in (shape, stride))
    helper = call.helper("copy", kernels.COPY)
    code = f"{helper}($0, {view.storage_offset()}L, {sizes}, {steps}, {len(shape)}, $1, "
    call.plan.add(f"{code}{made.size}L);", (call.source, made))
    return made


def _joined(call: Call) -> Buffer:
    parts, axis = call.arg(0, "tensors"), call.arg(1, "dim", 0)
    axis %= call.result.dim()
    if any(id(p) not in call.inputs for p in parts):
        raise call.refuse("one of its parts is no tensor that the network computes")
    buffers = [call.inputs[id(p)] for p in parts]
    known = [b.error for b in buffers]
    made = call.output(None if None in known else max(e for e in known if e is not None))
    inner = [math.prod(p.shape[axis:]) for p in parts]
    helper = call.helper(
        "put",
        "static void @put(const float *x, float *y, long outer, long inner, long step) {\n"
        "  for (long o = 0; o < outer; ++o)\n"
        "    for (long i = 0; i < inner; ++i) y[o * step + i] = x[o * inner + i];\n}\n",
    )
    at, outer = 0, math.prod(call.result.shape[:axis])
    for buffer, length in zip(buffers, inner, strict=True):
        code = f"{helper}($0, $1 + {at}L, {outer}L, {length}L, {sum(inner)}L);"
        call.plan.add(code, (buffer, made, *buffers))
        at += length
    return made


def _dropped(call: Call) -> Buffer:
    if call.arg(2, "training", True) and call.arg(1, "p", 0.5):
        raise call.refuse("it drops at random in eval mode too; give it training=self.training")
    return call.source


# --- arithmetic of two ----------------------------------------------------------------------------


def _binary(name: str, sign: str) -> Handler:
    def handle(call: Call) -> Buffer:
        a, b = call.arg(0, "input"), call.arg(1, "other")
        if call.kwargs.get("alpha", 1) != 1:
            raise call.refuse("it has an alpha")
        if call.kwargs.get("rounding_mode") is not None:
            raise call.refuse("it has a rounding_mode")
        numbers = [t for t in (a, b) if not isinstance(t, Tensor)]
        if numbers:
            return _with_number(call, a, b, sign)
        if a.shape != b.shape or any(id(t) not in call.inputs for t in (a, b)):
            raise call.refuse("it joins tensors of different shapes, or one that is not computed")
        if sign == "/":
            raise call.refuse("it divides by what the network computes")
        one, two = (call.inputs[id(t)] for t in (a, b))
        error = None
        if one.error is not None and two.error is not None:
            error = one.error + two.error
            if sign == "*":
                cross = one.largest * two.error + two.largest * one.error
                error = cross + one.error * two.error
        made = call.output(error)
        helper = call.helper(name, kernels.pair(name, sign))
        size = f"{made.size}L, {made.size}L, 1L"
        call.plan.add(f"{helper}($0, $1, $2, {size});", (one, two, made))
        return made

    return handle


def _with_number(call: Call, a: Any, b: Any, sign: str) -> Buffer:
    first = isinstance(a, Tensor)
    number = float(b if first else a)
    text = f"v {sign} {c_float(number)}" if first else f"{c_float(number)} {sign} v"
    if sign == "/" and not first:
        raise call.refuse("it divides by what the network computes")
    factor = abs(number) if sign == "*" else 1 / abs(number) if sign == "/" else 1.0
    call.args = (a if first else b,)
    return curve(call, text, factor)


# --- pooling and means ----------------------------------------------------------------------------


def _pair(value: Any, rank: int, other: int = 1) -> list[int]:
    """A number for each of two dimensions; ``other`` for the one that a 1-D layer does not have."""
    given = [value] * rank if isinstance(value, int) else list(value)
    given = given * rank if len(given) < rank else given
    return [other] * (2 - len(given)) + given


def _pool(
    call: Call,
    what: str,
    rank: int,
    kernel: Any,
    stride: Any,
    padding: Any = 0,
    dilation: Any = 1,
    counts: bool = True,
    divisor: int | None = None,
) -> Buffer:
    x, y = call.x, call.result
    if not isinstance(y, Tensor):
        raise call.refuse("it returns indices")
    if rank not in (1, 2):
        raise call.refuse("pooling over three dimensions is not written")
    made = call.output(call.source.error)
    h, w = [1] * (2 - rank) + list(x.shape[-rank:])
    oh, ow = [1] * (2 - rank) + list(y.shape[-rank:])
    stride = kernel if stride is None or stride == [] else stride
    windows = _pair(kernel, rank) if kernel else [0, 0]
    s = [x.numel() // (h * w), h, w, oh, ow, *windows, *_pair(stride, rank)]
    s += [*_pair(padding, rank, 0), *_pair(dilation, rank), int(counts), divisor or 0]
    helper = call.helper(what, kernels.POOLS[what], math=True)
    numbers = ", ".join(map(str, s))
    call.plan.add(f"{helper}((const int[]){{{numbers}}}, $0, $1);", (call.source, made))
    return made


def _max_module(rank: int) -> ModuleHandler:
    return lambda call, m: _pool(
        call, "max_pool", rank, m.kernel_size, m.stride, m.padding, m.dilation
    )


def _mean_module(rank: int) -> ModuleHandler:
    def handle(call: Call, m: Any) -> Buffer:
        divisor = getattr(m, "divisor_override", None)
        options = m.padding, 1, m.count_include_pad, divisor
        return _pool(call, "mean_pool", rank, m.kernel_size, m.stride, *options)

    return handle


def _max_function(rank: int) -> Handler:
    def handle(call: Call) -> Buffer:
        stride, padding = call.arg(2, "stride"), call.arg(3, "padding", 0)
        return _pool(
            call, "max_pool", rank, call.arg(1, "kernel_size"), stride, padding,
            call.arg(4, "dilation", 1),
        )  # fmt: skip

    return handle


def _mean_function(rank: int) -> Handler:
    def handle(call: Call) -> Buffer:
        stride, padding = call.arg(2, "stride"), call.arg(3, "padding", 0)
        counts, divisor = call.arg(5, "count_include_pad", True), call.arg(6, "divisor_override")
        kernel = call.arg(1, "kernel_size")
        return _pool(call, "mean_pool", rank, kernel, stride, padding, 1, counts, divisor)

    return handle


def _adaptive(what: str, rank: int) -> Handler:
    return lambda call: _pool(call, what, rank, 0, 1, counts=False)


def _adaptive_module(what: str, rank: int) -> ModuleHandler:
    handle = _adaptive(what, rank)
    return lambda call, module: handle(call)


def _mean(call: Call) -> Buffer:
    x, dims = call.x, call.arg(1, "dim")
    dims = range(x.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    axes = sorted(d % x.dim() for d in dims)
    if axes != list(range(x.dim() - len(axes), x.dim())):
        raise call.refuse("it is over other than the last dimensions")
    made = call.output(call.source.error)
    size = math.prod(x.shape[a] for a in axes)
    shape = [made.size, 1, size, 1, 1, 1, size, 1, 1, 0, 0, 1, 1, 1, 0]
    helper = call.helper("mean_pool", kernels.POOLS["mean_pool"], math=True)
    numbers = ", ".join(map(str, shape))
    call.plan.add(f"{helper}((const int[]){{{numbers}}}, $0, $1);", (call.source, made))
    return made


def _softmax(call: Call, dim: int | None, logarithm: bool) -> Buffer:
    x = call.x
    if dim is None:
        raise call.refuse("it does not say over which dimension")
    dim %= x.dim()
    made = call.output(call.grown(2.0 if logarithm else 0.5))
    sizes = math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])
    helper = call.helper("softmax", kernels.SOFTMAX, math=True)
    numbers = ", ".join(f"{size}L" for size in sizes)
    call.plan.add(f"{helper}($0, $1, {numbers}, {int(logarithm)});", (call.source, made))
    return made


def _modules() -> dict[type[nn.Module], ModuleHandler]:
    found: dict[type[nn.Module], ModuleHandler] = {}
    curves = {
        "relu": nn.ReLU, "relu6": nn.ReLU6, "hardtanh": nn.Hardtanh, "leaky_relu": nn.LeakyReLU,
        "elu": nn.ELU, "celu": nn.CELU, "selu": nn.SELU, "gelu": nn.GELU, "silu": nn.SiLU,
        "sigmoid": nn.Sigmoid, "logsigmoid": nn.LogSigmoid, "tanh": nn.Tanh,
        "tanhshrink": nn.Tanhshrink, "softplus": nn.Softplus, "softsign": nn.Softsign,
        "mish": nn.Mish, "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid,
    }  # fmt: skip
    for name, module in curves.items():
        found[module] = curve_module(name)
    for same in (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d):
        found[same] = lambda call, module: _same(call)
    found |= {nn.MaxPool1d: _max_module(1), nn.MaxPool2d: _max_module(2)}
    found |= {nn.AvgPool1d: _mean_module(1), nn.AvgPool2d: _mean_module(2)}
    found |= {nn.AdaptiveMaxPool1d: _adaptive_module("max_pool", 1)}
    found |= {nn.AdaptiveMaxPool2d: _adaptive_module("max_pool", 2)}
    found |= {nn.AdaptiveAvgPool1d: _adaptive_module("mean_pool", 1)}
    found |= {nn.AdaptiveAvgPool2d: _adaptive_module("mean_pool", 2)}
    found[nn.Softmax] = lambda call, module: _softmax(call, module.dim, False)
    found[nn.LogSoftmax] = lambda call, module: _softmax(call, module.dim, True)
    found |= {nn.PReLU: prelu, SReLU: srelu}
    return found


#: By the class of a module. Layers with weights are in `rewire.export.csource.trace`.
MODULES: dict[type[nn.Module], ModuleHandler] = _modules()

_SOFT = {
    False: lambda call: _softmax(call, call.arg(1, "dim"), False),
    True: lambda call: _softmax(call, call.arg(1, "dim"), True),
}
_ADD, _SUB, _MUL, _DIV = (
    _binary(name, sign) for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*"), ("div", "/"))
)

#: By the function that is called.
FUNCTIONS: dict[Any, Handler] = {
    **{getattr(F, name): curve_function(name) for name in CURVES if hasattr(F, name)},
    **{getattr(torch, name): curve_function(name) for name in CURVES if hasattr(torch, name)},
    operator.neg: curve_function("neg"),
    torch.clamp: clamped,
    torch.flatten: _same,
    torch.reshape: _same,
    torch.squeeze: _same,
    torch.unsqueeze: _same,
    F.dropout: _dropped,
    operator.getitem: _copied,
    torch.permute: _copied,
    torch.transpose: _copied,
    torch.cat: _joined,
    torch.mean: _mean,
    torch.softmax: _SOFT[False],
    torch.log_softmax: _SOFT[True],
    F.softmax: _SOFT[False],
    F.log_softmax: _SOFT[True],
    F.max_pool1d: _max_function(1),
    F.max_pool2d: _max_function(2),
    torch.max_pool1d: _max_function(1),
    torch.max_pool2d: _max_function(2),
    F.avg_pool1d: _mean_function(1),
    F.avg_pool2d: _mean_function(2),
    F.adaptive_avg_pool1d: _adaptive("mean_pool", 1),
    F.adaptive_avg_pool2d: _adaptive("mean_pool", 2),
    F.adaptive_max_pool1d: _adaptive("max_pool", 1),
    F.adaptive_max_pool2d: _adaptive("max_pool", 2),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _ADD),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), _SUB),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _MUL),
    **dict.fromkeys((operator.truediv, torch.div), _DIV),
}

#: By the method of a tensor.
METHODS: dict[str, Handler] = {
    **{name: curve_function(name) for name in ("relu", "sigmoid", "tanh", "abs", "neg")},
    **dict.fromkeys(
        ("flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "float", "detach"),
        _same,
    ),
    **dict.fromkeys(("permute", "transpose", "t", "select", "narrow"), _copied),
    "clamp": clamped,
    "mean": _mean,
    "softmax": _SOFT[False],
    "log_softmax": _SOFT[True],
    "add": _ADD,
    "sub": _SUB,
    "mul": _MUL,
    "div": _DIV,
}

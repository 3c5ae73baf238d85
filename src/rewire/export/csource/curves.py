"""Activations: functions of one number, some with numbers that were learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewire.export.csource import kernels
from rewire.export.csource.call import Call, Handler, ModuleHandler
from rewire.export.csource.plan import Buffer, c_float

__all__ = [
    "CURVES",
    "clamped",
    "curve",
    "curve_function",
    "curve_module",
    "per_channel",
    "prelu",
    "srelu",
]


def _sigmoid(of: str = "v") -> str:
    return f"1.0f / (1.0f + expf(-{of}))"


def _clamp(low: float, high: float) -> str:
    low = min(low, high)  # PyTorch gives the upper limit where they are crossed
    return f"v < {c_float(low)} ? {c_float(low)} : v > {c_float(high)} ? {c_float(high)} : v"


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> str:
    b, t = c_float(beta), c_float(threshold)
    return f"v * {b} > {t} ? v : log1pf(expf(v * {b})) / {b}"


_SIX = "(v < -3.0f ? 0.0f : v > 3.0f ? 6.0f : v + 3.0f)"
_SELU, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772

#: Expression of v, and the Lipschitz constant, by name; parameters are those of the functions of
#: PyTorch, in their order, with the defaults that they have there.
CURVES: dict[str, tuple[tuple[tuple[str, Any], ...], Callable[..., tuple[str, float]]]] = {
    "relu": ((), lambda: ("v > 0.0f ? v : 0.0f", 1.0)),
    "relu6": ((), lambda: (_clamp(0, 6), 1.0)),
    "hardtanh": ((("min_val", -1.0), ("max_val", 1.0)), lambda low, high: (_clamp(low, high), 1.0)),
    "leaky_relu": (
        (("negative_slope", 0.01),),
        lambda slope: (f"v > 0.0f ? v : v * {c_float(slope)}", max(1.0, abs(slope))),
    ),
    "elu": (
        (("alpha", 1.0),),
        lambda alpha: (f"v > 0.0f ? v : {c_float(alpha)} * expm1f(v)", max(1.0, abs(alpha))),
    ),
    "celu": (
        (("alpha", 1.0),),
        lambda a: (f"v > 0.0f ? v : {c_float(a)} * expm1f(v / {c_float(a)})", 1.0),
    ),
    "selu": (
        (),
        lambda: (
            f"{c_float(_SELU)} * (v > 0.0f ? v : {c_float(_SELU_ALPHA)} * expm1f(v))",
            _SELU * _SELU_ALPHA,
        ),
    ),
    "gelu": (
        (("approximate", "none"),),
        lambda how: (
            f"0.5f * v * (1.0f + erff(v * {c_float(math.sqrt(0.5))}))"
            if how == "none"
            else f"0.5f * v * (1.0f + tanhf({c_float(math.sqrt(2 / math.pi))} * "
            "(v + 0.044715f * v * v * v)))",
            1.13,
        ),
    ),
    "silu": ((), lambda: (f"v * ({_sigmoid()})", 1.1)),
    "sigmoid": ((), lambda: (_sigmoid(), 0.25)),
    "logsigmoid": ((), lambda: ("(v < 0.0f ? v : 0.0f) - log1pf(expf(v < 0.0f ? v : -v))", 1.0)),
    "tanh": ((), lambda: ("tanhf(v)", 1.0)),
    "tanhshrink": ((), lambda: ("v - tanhf(v)", 1.0)),
    "softplus": (
        (("beta", 1.0), ("threshold", 20.0)),
        lambda beta, threshold: (_softplus(beta, threshold), 1.01),
    ),
    "softsign": ((), lambda: ("v / (1.0f + fabsf(v))", 1.0)),
    "mish": ((), lambda: (f"v * tanhf({_softplus()})", 1.1)),
    "hardswish": ((), lambda: (f"v * {_SIX} / 6.0f", 1.5)),
    "hardsigmoid": ((), lambda: (f"{_SIX} / 6.0f", 1 / 6)),
    "neg": ((), lambda: ("-v", 1.0)),
    "abs": ((), lambda: ("fabsf(v)", 1.0)),
}


def curve(call: Call, expression: str, lipschitz: float) -> Buffer:
    made = call.output(call.grown(lipschitz))
    names = [n for n, text in call.plan.helpers.items() if f" = {expression};" in text]
    name = names[0] if names else f"curve{sum(n.startswith('curve') for n in call.plan.helpers)}"
    text = kernels.elementwise(name, expression)
    helper = call.helper(name, text, math="f(" in expression)
    call.plan.add(f"{helper}($0, $1, {made.size}L);", (call.source, made))
    return made


def curve_function(name: str) -> Handler:
    parameters, make = CURVES[name]

    def handle(call: Call) -> Buffer:
        given = [call.arg(1 + i, key, default) for i, (key, default) in enumerate(parameters)]
        return curve(call, *make(*given))

    return handle


def curve_module(name: str) -> ModuleHandler:
    parameters, make = CURVES[name]
    return lambda call, module: curve(call, *make(*(getattr(module, key) for key, _ in parameters)))


def clamped(call: Call) -> Buffer:
    low, high = call.arg(1, "min"), call.arg(2, "max")
    if any(isinstance(limit, Tensor) for limit in (low, high)):
        raise call.refuse("its limits are tensors")
    most = torch.finfo(torch.float32).max
    low, high = (-most if low is None else low), (most if high is None else high)
    return curve(call, _clamp(low, high), 1.0)


def per_channel(call: Call, numbers: dict[str, Tensor], inner: int, expression: str) -> Buffer:
    """A curve with learned numbers, which repeat after as many floats as there are, each for
    ``inner`` floats in a row.
    """
    slope = max(1.0, *(float(n.abs().max()) for n in numbers.values()))
    made = call.output(call.grown(slope))
    number = sum(name.startswith("units") for name in call.plan.helpers)
    name = f"units{number}"
    reads = []
    for key, tensor in numbers.items():
        array = call.plan.array(f"{name}_{key}", tensor)
        reads.append(f"    const float {key} = @{array}[i / {inner}L % {tensor.numel()}L];\n")
    text = (
        f"static void @{name}(const float *x, float *y, long n) {{\n"
        "  for (long i = 0; i < n; ++i) {\n"
        f"    const float v = x[i];\n{''.join(reads)}    y[i] = {expression};\n  }}\n}}\n"
    )
    call.plan.add(f"{call.helper(name, text)}($0, $1, {made.size}L);", (call.source, made))
    return made


def prelu(call: Call, module: Any) -> Buffer:
    inner = math.prod(call.x.shape[2:]) if module.weight.numel() > 1 else 1
    return per_channel(call, {"slope": module.weight}, inner, "v > 0.0f ? v : slope * v")


def srelu(call: Call, module: Any) -> Buffer:
    numbers = {
        "tl": module.t_left,
        "al": module.a_left,
        "tr": module.t_left + module.t_right.abs(),
        "ar": module.a_right,
    }
    curve = "v <= tl ? tl + al * (v - tl) : v >= tr ? tr + ar * (v - tr) : v"
    return per_channel(call, numbers, 1, curve)

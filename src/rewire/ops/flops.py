"""Tells `torch.utils.flop_counter.FlopCounterMode` what products cost: 2 K N for K connections that
are used N times each.

The rules are those that PyTorch has for dense layers: a multiply-add counts as two, adding a bias
counts nothing, positions that a convolution reads from its padding count like others, and each of
the two gradients costs as much as the product.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["announce", "note"]

_COUNTER = "torch.utils.flop_counter"


def _connections(ptr: Tensor, idx: Tensor) -> int:
    """K; for meta and fake tensors, where it cannot be read, the number of slots."""
    if type(ptr) is not Tensor or ptr.device.type == "meta":
        return idx.shape[0]
    return int(ptr[-1].item())


def _products(each: int) -> Callable[..., int]:
    """``each`` operations for a connection and a row of the fifth argument."""

    def count(
        ptr: Tensor, idx: Tensor, slots: Tensor, pool: Any, x: Tensor, *rest: Any, **named: Any
    ) -> int:
        return each * _connections(ptr, idx) * x.shape[0]

    return count


def _frozen(
    ptr: Tensor, cols: Tensor, values: Any, scale: Any, x: Tensor, *rest: Any, **named: Any
) -> int:
    return 2 * cols.shape[0] * x.shape[0]


def _positions(y: Tensor) -> int:
    return y.shape[0] * math.prod(y.shape[2:])


def _conv(ptr: Tensor, idx: Tensor, *rest: Any, out_val: Any, **named: Any) -> int:
    return 2 * _connections(ptr, idx) * _positions(out_val)


def _conv_gradient(
    ptr: Tensor, idx: Tensor, slots: Tensor, pool: Any, g: Tensor, *rest: Any, **named: Any
) -> int:
    return 2 * _connections(ptr, idx) * _positions(g)


_FORMULAS: dict[str, Callable[..., int]] = {
    "spmm": _products(2),
    "sddmm": _products(2),
    "spmm_sddmm": _products(4),
    "frozen_linear": _frozen,
    "conv": _conv,
    "conv_input_gradient": _conv_gradient,
    "conv_value_gradient": _conv_gradient,
}


def announce(operators: Sequence[str]) -> None:
    """Register the formulas of these native operators, now or as soon as the counter is imported.

    They must be registered before a counter is made. Importing its module here would slow down
    every import of this library, for a tool that few programs use.
    """
    names = [name for name in operators if name in _FORMULAS]
    if not names:
        return
    module = sys.modules.get(_COUNTER)
    if module is not None:
        _register(module, names)
    else:
        sys.meta_path.insert(0, _WhenImported(names))


def _register(module: ModuleType, names: Sequence[str]) -> None:
    for name in names:
        packet = getattr(torch.ops.rewire, name)
        if packet not in module.flop_registry:
            module.register_flop_formula([packet], get_raw=True)(_FORMULAS[name])


class _WhenImported:
    """An entry of `sys.meta_path` that registers the formulas once the counter's module is
    imported.

    It takes itself off the list then, and leaves finding the module to the other entries.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute, names = spec.loader.exec_module, self._names

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module, names)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def note(name: str, *args: Any, out: Any = None) -> None:
    """Count a product that the reference computes, because the counter does not know some of its
    operations.
    """
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return
    module = sys.modules.get(_COUNTER)
    for mode in _get_current_dispatch_mode_stack() if module is not None else ():
        if isinstance(mode, module._FlopCounterMode):  # type: ignore[union-attr]
            counter = mode.counter
            flops = _FORMULAS[name](*args, out_val=out)
            for parent in set(counter.mod_tracker.parents):
                counter.flop_counts[parent][f"rewire.{name}"] += flops

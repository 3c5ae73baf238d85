"""Eval mode for a while; and forward passes as in training, but without chance or side effects."""

from __future__ import annotations

import contextlib
import random as python_random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rewire.nn.forward.tensors import tensors_in
from rewire.nn.weight.pool import SparseWeight

__all__ = ["evaluating", "in_backward", "rehearsing"]


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside the ``with``; afterwards each module has its mode back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def in_backward() -> bool:
    """Whether autograd computes gradients now: a forward pass then is a repetition for activation
    checkpointing.
    """
    return int(torch._C._current_graph_task_id()) != -1


class _Expected(TorchDispatchMode):
    """Random operations give fixed numbers; dropout and random masks give their expectation."""

    #: The least exact floating dtype of any result.
    coarsest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            result = self._instead(func, args, kwargs or {})
        else:
            result = func(*args, **(kwargs or {}))
        for x in (result,) if isinstance(result, Tensor) else tensors_in(result):
            if x.dtype is not self.coarsest and x.is_floating_point():
                self.coarsest = max(self.coarsest, x.dtype, key=lambda d: torch.finfo(d).eps)
        return result

    def _instead(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        result = func(*args, **kwargs)
        if name in ("bernoulli_", "bernoulli"):
            chance = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            expected = args[0] if name == "bernoulli" and len(args) == 1 else chance
            number = not isinstance(expected, Tensor)
            return result.fill_(expected) if number else result.copy_(expected)
        if name.removesuffix("_").removesuffix("_like") in _DRAWN and result.is_floating_point():
            return result.fill_(0.5)
        return result  # integers and permutations; the generators are seeded


#: Without the ends "_" and "_like".
_DRAWN = ("rand", "randn", "normal", "normal_functional", "uniform")


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Let compiled code run eagerly."""
    eager: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
        eager = torch.compiler.set_stance("force_eager")
    return eager


@contextlib.contextmanager
def rehearsing(model: nn.Module, *, train: bool) -> Iterator[_Expected]:
    """Forward passes as in training (or in eval mode) without side effects and without chance.

    Dropout and other random factors have their expected values. Afterwards modes, buffers and all
    random generators are as before. Meanwhile buffers are other tensors, so graphs of earlier
    forward passes stay valid. Compiled code runs eagerly.
    """
    modes = [(module, module.training) for module in model.modules()]
    owners = [m for m in model.modules() if m._buffers and not isinstance(m, SparseWeight)]
    buffers = [(module, dict(module._buffers)) for module in owners]
    devices = {
        t.device.index or 0
        for t in [*model.parameters(), *model.buffers()]
        if t.device.type == "cuda"
    }
    python, numpy = python_random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(sorted(devices)), _eager(), _Expected() as expected:  # type: ignore[no-untyped-call]
            # Not torch.manual_seed, which also looks for devices that may not be there.
            torch.default_generator.manual_seed(0)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(0)
            python_random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            model.train(train)
            for module, own in buffers:
                for name, t in own.items():
                    module._buffers[name] = None if t is None else t.clone()
            yield expected
    finally:
        python_random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for module, own in buffers:
            module._buffers.clear()
            module._buffers.update(own)
        for module, mode in modes:
            module.training = mode

"""Training and eval mode, put back afterwards; forward passes as in training that leave no
trace.
"""

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
    """Eval mode and no gradients; every module's own mode is as before afterwards."""
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
    """Whether autograd computes gradients now: a forward pass in there is a checkpoint's, and was
    seen before.
    """
    return int(torch._C._current_graph_task_id()) != -1


class _Expected(TorchDispatchMode):
    """Random operations give the same numbers whatever the shape: masks their expectation, so
    dropout does nothing.
    """

    #: The least exact floating dtype that any operation gave.
    coarsest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            result = self._instead(func, args, kwargs or {})
        else:
            result = func(*args, **(kwargs or {}))
        for x in (result,) if isinstance(result, Tensor) else tensors_in(result):
            if (
                x.dtype is not self.coarsest
                and x.is_floating_point()
                and torch.finfo(x.dtype).eps > torch.finfo(self.coarsest).eps
            ):
                self.coarsest = x.dtype
        return result

    def _instead(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        result = func(*args, **kwargs)
        if name in ("bernoulli_", "bernoulli"):
            chance = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            expected = args[0] if name == "bernoulli" and len(args) == 1 else chance
            return (
                result.copy_(expected) if isinstance(expected, Tensor) else result.fill_(expected)
            )
        if name in _DRAWN and result.is_floating_point():
            return result.fill_(0.5)
        return result  # whole numbers, orders: the generators are seeded


_DRAWN = (
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "normal",
    "normal_",
    "normal_functional",
    "uniform",
    "uniform_",
)


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Compiled code runs eagerly. Importing the compiler takes seconds, and without it nothing is
    compiled.
    """
    return (
        torch.compiler.set_stance("force_eager")
        if "torch._dynamo" in sys.modules
        else contextlib.nullcontext()
    )


@contextlib.contextmanager
def rehearsing(model: nn.Module, *, train: bool) -> Iterator[_Expected]:
    """Forward passes as in training (or in eval mode) without consequences and without chance.

    Dropout and other random factors are at their expectation. Afterwards modes, buffers and all
    random generators are what they were; buffers are other objects meanwhile, so graphs of earlier
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
            # torch.manual_seed also looks for machines that are not there
            torch.default_generator.manual_seed(0)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(0)
            python_random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            model.train(train)
            for module, own in buffers:
                module._buffers.update(
                    {name: None if t is None else t.clone() for name, t in own.items()}
                )
            yield expected
    finally:
        python_random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for module, own in buffers:
            module._buffers.clear()
            module._buffers.update(own)
        for module, mode in modes:
            module.training = mode

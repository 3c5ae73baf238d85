"""Function transforms of `torch.func`, which sparse layers do not support."""

from __future__ import annotations

import torch

__all__ = ["refuse_transforms", "transformed"]


def transformed() -> bool:
    """Whether torch.vmap, torch.func.grad or the like is at work."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def refuse_transforms() -> RuntimeError:
    """The error to raise under them."""
    return RuntimeError(
        "sparse layers do not work inside torch.vmap, torch.func.grad, vjp, jvp and the like (nor "
        "with the models that torch.func.stack_module_state stacks): use torch.autograd.grad (with "
        "create_graph=True for higher derivatives) on the result of torch.func.functional_call, "
        "and a loop over samples or models instead of vmap"
    )

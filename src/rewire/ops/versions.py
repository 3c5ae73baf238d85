"""Finds pools that changed between forward and backward, also where autograd does not check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_versions", "remember_versions"]


def remember_versions(ctx: Any, *tensors: Tensor) -> None:
    """Note the version counters of a pool's tensors in forward, for `check_versions` in backward.

    Autograd checks the tensors that it saves itself, but not those that hooks unpack: activation
    checkpointing computes saved tensors again, with the topology there is by then. Notes nothing
    while a compiler traces, or in inference mode.
    """
    if torch.compiler.is_compiling():
        ctx.versions = ()
        return
    versions = []  # plain loops: this is part of every forward pass
    for t in tensors:
        if t.is_inference():
            ctx.versions = ()
            return
        versions.append((t, t._version))
    ctx.versions = versions


def check_versions(ctx: Any) -> None:
    """Raise RuntimeError if a tensor that `remember_versions` saw has changed since."""
    for tensor, version in ctx.versions:
        if tensor._version != version:
            raise RuntimeError(
                "a sparse weight was modified by an inplace operation (rewired, loaded or stepped) "
                "between forward and backward: its gradient would be wrong; run the forward again"
            )

"""Refuses models whose parameters are sharded (FSDP, tensor parallelism): pools cannot be."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from rewire.nn.weight.listing import sparse_weights
from rewire.nn.weight.pool import SparseWeight
from rewire.nn.weight.storage import SHARDED

__all__ = ["refuse_sharded"]


def refuse_sharded(model: nn.Module) -> None:
    """Raise RuntimeError, with the name, if sparse weights are cut up between ranks."""
    found = _sharding(model)
    if found is not None:
        raise RuntimeError(found + SHARDED)


def _sharding(model: nn.Module) -> str | None:
    """What cuts up the sparse weights of a model, in words; None if nothing does."""
    pools = list(sparse_weights(model))
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # without it nothing can be wrapped in it
    if fsdp is not None and pools:
        for name, module in model.named_modules():
            if any(isinstance(m, SparseWeight) for m in module.modules()):
                if isinstance(module, fsdp.FullyShardedDataParallel):
                    return f"{name or 'the model'} is wrapped in FullyShardedDataParallel (FSDP)"
                if isinstance(module, fsdp.FSDPModule) and any(
                    type(w.values).__name__ == "DTensor" for _, w in pools
                ):
                    return f"{name or 'the model'} is sharded by fully_shard (FSDP2)"
    for name, weight in pools:
        kind = type(weight.values).__name__
        if kind == "DTensor":
            return f"{name}.values is a DTensor (tensor parallelism, FSDP2)"
        if hasattr(weight.values, "ds_id") or weight.values.shape != weight.rows.shape:
            return f"{name}.values has been cut up or flattened (as DeepSpeed's ZeRO does)"
    return None

"""Training with DistributedDataParallel: identical topology on all ranks, and proof of it."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rewire import random
from rewire.nn import Event, SparseWeight, sparse_weights

__all__ = ["TopologyMismatch", "prepare", "sum_over_ranks"]

#: The process group that a pool was prepared for, where it is not the default one.
_GROUPS: weakref.WeakKeyDictionary[SparseWeight, dist.ProcessGroup] = weakref.WeakKeyDictionary()


class TopologyMismatch(RuntimeError):
    """Ranks hold different topologies: a gradient all-reduce would mix unrelated connections."""


def prepare(
    model: nn.Module,
    *,
    process_group: dist.ProcessGroup | None = None,
    seed: int | None = None,
    check_every: int = 1,
) -> nn.Module:
    """Make ``model`` ready for DDP; call on every rank, before wrapping and before making the method. Returns it.

    - Rank 0's topology and values are broadcast, once.
    - The index buffers are kept out of DDP's broadcast of buffers at every step, which costs several times the step.
    - A seed is agreed on (rank 0's ``seed``, or one drawn there) and kept as ``shared_seed`` of every pool; methods
      made afterwards use it. They decide by synchronised values, seed and step alone, so the ranks rewire alike.
    - Every ``check_every`` training forwards, a running hash of all changes of topology is compared between ranks;
      `TopologyMismatch` is raised on every rank if they differ. The check is by count, not by event, because a rank
      that rewires alone would otherwise wait for the others for ever. It is one all-reduce of two numbers; a compiled
      model leaves it out.

    Raises RuntimeError without an initialised process group, ValueError where ranks have pools of different sizes.
    """
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    if check_every < 1:
        raise ValueError(f"check_every must be a number of forwards of at least 1, not {check_every}")
    pools = list(sparse_weights(model))
    if any(weight.shared_seed is not None for _, weight in pools):
        raise RuntimeError("this model is prepared already: call prepare once, before wrapping it in DDP")
    device = pools[0][1].device if pools else torch.device("cpu")
    source = dist.get_global_rank(process_group, 0) if process_group else 0
    agreed = torch.tensor([random.seed_from() if seed is None else seed], dtype=torch.int64, device=device)
    dist.broadcast(agreed, source, group=process_group)
    _same_sizes(pools, process_group, device)
    for _, weight in pools:
        _broadcast(weight, source, process_group)
        weight.shared_seed = int(agreed.item())
        if process_group is not None:
            _GROUPS[weight] = process_group
    ignored = {
        f"{name}.{buffer}" if name else buffer for name, w in pools for buffer, _ in w.named_buffers(recurse=False)
    }
    ignored |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))  # what the user asked for already
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))
    guard = _Guard(process_group, device, check_every)
    for number, (_, weight) in enumerate(pools):
        weight.follow(lambda event, number=number: guard.note(number, event))
    model.register_forward_pre_hook(guard.before_forward)
    return model


def sum_over_ranks(weight: SparseWeight, tensor: Tensor) -> Tensor:
    """``tensor`` summed over the ranks that share ``weight``, in place and with the same bits everywhere; returns it.

    As it is, for a pool that was not prepared. For what a method computes of a rank's own samples.
    """
    if weight.shared_seed is not None and dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, group=_GROUPS.get(weight))
    return tensor


def _same_sizes(pools: list[tuple[str, SparseWeight]], group: dist.ProcessGroup | None, device: torch.device) -> None:
    mine = [(name, tuple(w.shape), w.capacity) for name, w in pools]
    everyone: list[list[tuple[str, tuple[int, ...], int]] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise ValueError(
                f"rank {rank} has sparse weights {theirs}, rank 0 has {everyone[0]}: build the same model on all ranks"
            )


def _broadcast(weight: SparseWeight, source: int, group: dist.ProcessGroup | None) -> None:
    tensors = [weight.values.detach().clone(), weight.rows.clone(), weight.cols.clone()]
    for tensor in tensors:
        dist.broadcast(tensor, source, group=group)
    state = dict(zip(("values", "rows", "cols"), tensors, strict=True))
    weight.load_state_dict(state)


class _Guard:
    """Compares the history of topology changes between ranks, at counted forwards."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, every: int) -> None:
        self._group, self._device, self._every = group, device, every
        self._hash = 0
        self._forwards = 0

    def note(self, number: int, event: Event) -> None:
        weight = event.weight
        if event.loaded or event.source is not None:
            words = [number, weight.fingerprint(), weight.connections]
        else:
            # A position-dependent sum over the change, cheap next to the change itself.
            slots, rows, cols = event.slots, weight.rows[event.slots].long(), weight.cols[event.slots].long()
            mixed = (slots * 0x9E3779B1 + rows * 0x85EBCA77 + cols * 0xC2B2AE3D) ^ (rows << 20)
            words = [number, slots.numel(), int(mixed.sum().item())]
        for word in words:
            self._hash = (self._hash * 0x100000001B3 ^ word) & (random.SEED_BOUND - 1)

    def before_forward(self, module: nn.Module, args: object) -> None:
        if not module.training or torch.compiler.is_compiling():
            return
        self._forwards += 1
        if self._forwards % self._every:
            return
        # One all-reduce finds minimum and maximum: the minimum of x and of its complement.
        both = torch.tensor([self._hash, random.SEED_BOUND - 1 - self._hash], device=self._device)
        dist.all_reduce(both, dist.ReduceOp.MIN, group=self._group)
        if int(both[0]) != self._hash or int(both[1]) != random.SEED_BOUND - 1 - self._hash:
            raise TopologyMismatch(
                "the ranks' topologies have diverged: rewire only through a method, or identically on all ranks; "
                "reload the last checkpoint on all of them"
            )

"""Training on several ranks: with DistributedDataParallel, where topologies stay identical on all
of them, and layers that are divided among them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rewire import random
from rewire.nn import Event, SparseLinear, SparseWeight, sparse_weights
from rewire.nn.layers import row_sharded
from rewire.nn.layers.initial import Init
from rewire.nn.layers.row_sharded import RowSharded, clip_grad_norm_, told_by_all
from rewire.nn.weight.sharded import refuse_sharded

__all__ = [
    "RowSharded",
    "TopologyMismatch",
    "agree",
    "alone",
    "clip_grad_norm_",
    "prepare",
    "refuse_unprepared",
    "shard_rows",
    "sum_over_ranks",
]

#: Of prepared weights, the process group, if it is not the default one, and the guard.
_GROUPS: weakref.WeakKeyDictionary[SparseWeight, dist.ProcessGroup] = weakref.WeakKeyDictionary()
_GUARDS: weakref.WeakKeyDictionary[SparseWeight, _Guard] = weakref.WeakKeyDictionary()
#: Models and weights that this rank trains for itself.
_ALONE: weakref.WeakSet[nn.Module] = weakref.WeakSet()

_DIVERGED = (
    "the ranks' topologies have diverged: rewire only through a method, or identically on all "
    "ranks, and let all ranks make the same steps; reload the last checkpoint on all of them"
)
_UNEVEN = (
    "within torch.distributed.algorithms.join.Join, ranks that have run out of batches make no "
    "more steps, so weights cannot be rewired and nothing can be summed over ranks there: let all "
    "ranks make the same steps (DistributedSampler), use Join(..., "
    "throw_on_early_termination=True), or a method that rewires at the ends of epochs, with "
    "end_epoch() after the Join"
)


class TopologyMismatch(RuntimeError):
    """Ranks have different topologies, so that summed gradients mix unrelated connections."""


def prepare(
    model: nn.Module,
    *,
    process_group: dist.ProcessGroup | None = None,
    seed: int | None = None,
    check_every: int = 1,
) -> nn.Module:
    """Make ``model`` ready for DDP, and return it. Call this on every rank, before wrapping the
    model and before making the method::

        model = rewire.distributed.prepare(model)
        ddp = DistributedDataParallel(model)

    - Rank 0 broadcasts its topology and values, once.
    - DDP leaves the index buffers out of its broadcast at every step, which would cost several
      times the step.
    - The ranks agree on a seed (rank 0's ``seed``, or one drawn there), the ``shared_seed`` of
      every sparse weight. Methods made afterwards use it. Their decisions depend on synchronised
      values, seed and step only, so all ranks rewire alike.
    - Before every ``check_every``-th optimizer step whose gradients DDP has reduced, and at every
      `Method.end_epoch`, the ranks compare a running hash of all changes of topology. If they
      differ, every rank raises `TopologyMismatch`, and the step is not made. This is one all-reduce
      of a few numbers in its own group (gloo, if available), so it does not wait for the GPU.
      Forward passes alone compare nothing, and a compiled model leaves the comparison out.

    Under `torch.distributed.algorithms.join.Join` ranks make different numbers of steps, so the
    topology stays as it is: methods that rewire at steps, or sum over ranks, raise RuntimeError at
    the first change. Methods that rewire at the ends of epochs work, and count the largest number
    of steps of all ranks.

    Raises RuntimeError without an initialised process group and for a model that is already wrapped
    (in DDP, FSDP or the like) or prepared, ValueError if ranks have sparse weights of different
    sizes.
    """
    _refuse_uninitialised()
    if check_every < 1:
        raise ValueError(f"check_every must be a number of steps of at least 1, not {check_every}")
    if isinstance(model, DistributedDataParallel):
        raise RuntimeError(
            "the model is wrapped in DistributedDataParallel already: call model = "
            "rewire.distributed.prepare(model) before wrapping it"
        )
    refuse_sharded(model)
    if any(isinstance(module, RowSharded) for module in model.modules()):
        raise RuntimeError(
            "a layer of the model is divided by shard_rows, so all ranks must read the same batch, "
            "and under DistributedDataParallel each reads its own: leave one of the two out"
        )
    pools = list(sparse_weights(model))
    if any(weight.shared_seed is not None for _, weight in pools):
        raise RuntimeError(
            "this model is prepared already: call prepare once, before wrapping it in DDP"
        )
    device = pools[0][1].device if pools else torch.device("cpu")
    source = dist.get_global_rank(process_group, 0) if process_group else 0
    seed = random.seed_from() if seed is None else seed
    agreed = torch.tensor([seed], dtype=torch.int64, device=device)
    dist.broadcast(agreed, source, group=process_group)
    _same_sizes(pools, process_group)
    guard = _Guard([weight for _, weight in pools], process_group, device, check_every)
    for number, (_, weight) in enumerate(pools):
        _broadcast(weight, source, process_group)
        weight.shared_seed = int(agreed.item())
        if process_group is not None:
            _GROUPS[weight] = process_group
        _ALONE.discard(weight)
        _GUARDS[weight] = guard
        weight.before_change = guard.refuse_uneven
        weight.follow(lambda event, number=number: guard.note(number, event))
    _ALONE.discard(model)
    ignored = {
        f"{name}.{buffer}" if name else buffer
        for name, w in pools
        for buffer, _ in w.named_buffers(recurse=False)
    }
    # with the buffers that the user excluded already
    ignored |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))
    model.register_forward_pre_hook(_AtForward(guard))
    here = weakref.ref(guard)
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: _before_step(here, optimizer)
    )
    weakref.finalize(guard, handle.remove)
    return model


def alone(model: nn.Module) -> nn.Module:
    """Declare that this rank trains ``model`` for itself, independent of other ranks; returns it.

    Methods then accept it although the process group has several ranks. Raises RuntimeError for a
    model that `prepare` has made ready for training together.
    """
    pools = [weight for _, weight in sparse_weights(model)]
    if any(weight.shared_seed is not None for weight in pools):
        raise RuntimeError(
            "this model is prepared for DDP, so its ranks train together: use a copy "
            "(copy.deepcopy)"
        )
    for module in (model, *pools):
        _ALONE.add(module)
    return model


def shard_rows(
    layer: SparseLinear,
    group: dist.ProcessGroup | None = None,
    *,
    seed: int | None = None,
    init: Init = "auto",
) -> RowSharded:
    """Divide the rows (outputs) of ``layer`` among the ranks: each holds, trains and rewires about
    1 / ranks of its connections. Call this on every rank, before making the optimizer::

        with torch.device("meta"):      # so that no rank ever has the whole of it
            layer = rewire.nn.SparseLinear(1_000_000, 400_000, connections=10_000_000)
        model.first = rewire.distributed.shard_rows(layer)

    All ranks then read the same batch and make the same steps; each gets all outputs. What is not
    divided must be equal on all ranks, as after ``torch.manual_seed`` with one number, and stays
    so. Every rank keeps its share of the budget, so K is exact at every moment; methods act on a
    rank's part as on a weight of its own, with random numbers of its own. Clip gradients by
    `clip_grad_norm_` of this module, which knows all parts. Not for models under DDP, whose ranks
    read different batches.

    Args:
        layer: equal on all ranks, or on the meta device: then each rank draws its own rows, on the
            CPU.
        group: the process group; the default one if None.
        seed, init: for what is drawn; by default rank 0 draws the seed.

    Raises RuntimeError without an initialised process group, ValueError for limits on fan-out or
    blocks, which no rank sees, for layers that differ between ranks, and where a rank would have no
    connection.
    """
    _refuse_uninitialised()
    shard, ranks = row_sharded.cut(layer, group, seed, init)
    alone(shard)
    return RowSharded(shard, ranks)


def _refuse_uninitialised() -> None:
    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group first"
        )


def several_ranks() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def refuse_unprepared(
    model: nn.Module, pools: Iterable[tuple[str, SparseWeight]], what: str, *, in_ranks: bool = True
) -> None:
    """Raise RuntimeError if there are several ranks and ``what`` (a method) could not act on all of
    them alike.

    ``in_ranks``: whether it could with prepared weights.
    """
    if not several_ranks():
        return
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if not in_ranks and inner not in _ALONE:
        raise RuntimeError(
            f"{what} changes the shapes of parameters by what each rank sees for itself, and "
            "DistributedDataParallel knows nothing of it: train in one process, or, where every "
            "rank trains a model of its own, call model = rewire.distributed.alone(model) first"
        )
    for name, weight in pools:
        if weight.shared_seed is None and weight not in _ALONE:
            raise RuntimeError(
                f"{dist.get_world_size()} ranks train, and {name} is not prepared for it, so "
                f"{what} would give each another topology: before wrapping the model and making "
                "the method, write\n    model = rewire.distributed.prepare(model)\nor, where every "
                "rank trains a model of its own, model = rewire.distributed.alone(model)"
            )


def agree(weights: Iterable[SparseWeight], steps: int) -> int:
    """At the end of an epoch, the largest number of steps of all ranks that share ``weights``.

    For weights that were not prepared this is ``steps`` itself. Raises `TopologyMismatch` on all
    ranks if their topologies differ, RuntimeError within a Join. One small all-reduce.
    """
    guards = {id(g): g for g in (_GUARDS.get(weight) for weight in weights) if g is not None}
    for guard in guards.values():
        steps = guard.meet(steps)
    return steps


def sum_over_ranks(weight: SparseWeight, tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over the ranks that share ``weight``, in place, and return it.

    The result has the same bits on all ranks. Without several ranks ``tensor`` stays as it is. This
    is for what a method computes from the samples of its own rank. Raises RuntimeError within a
    Join.
    """
    if weight.shared_seed is not None and dist.is_available() and dist.is_initialized():
        if weight.before_change is not None:
            weight.before_change()
        dist.all_reduce(tensor, group=_GROUPS.get(weight))
    return tensor


def _same_sizes(pools: list[tuple[str, SparseWeight]], group: dist.ProcessGroup | None) -> None:
    mine = [(name, tuple(w.shape), w.capacity, str(w.limits), _digest(w)) for name, w in pools]
    everyone = told_by_all(mine, group)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise ValueError(
                f"rank {rank} has sparse weights {theirs}, rank 0 has {everyone[0]} (name, shape, "
                "slots, limits, and a hash of allowed and frozen positions): build the same model "
                "on all ranks"
            )


def _digest(weight: SparseWeight) -> str:
    return "" if weight.prior is None else weight.prior.digest()


def _broadcast(weight: SparseWeight, source: int, group: dist.ProcessGroup | None) -> None:
    tensors = [weight.values.detach().clone(), weight.rows.clone(), weight.cols.clone()]
    for tensor in tensors:
        dist.broadcast(tensor, source, group=group)
    state = dict(zip(("values", "rows", "cols"), tensors, strict=True))
    weight.load_state_dict(state)


#: Marks a DDP model inside a Join; torch replaces the mark when the Join ends.
_IN_JOIN: Any = object()


class _AtForward:
    """The hook that tells a guard of forward passes; in a copy of the model it does nothing."""

    def __init__(self, guard: _Guard | None = None) -> None:
        self.guard = guard

    def __call__(self, module: nn.Module, args: object) -> None:
        if self.guard is not None and not torch.compiler.is_compiling():
            self.guard.before_forward()

    def __deepcopy__(self, memo: object) -> _AtForward:
        return _AtForward()

    def __reduce__(self) -> Any:
        return _AtForward, ()


def _before_step(guard: weakref.ref[_Guard], optimizer: Optimizer) -> None:
    here = guard()
    if here is not None:
        here.before_step(optimizer)


class _Guard:
    """Compares the changes of topology between ranks before optimizer steps that all of them make.

    Those are the steps whose gradients DDP has reduced, after a forward pass of DDP that prepared
    it.
    """

    def __init__(
        self,
        weights: list[SparseWeight],
        group: dist.ProcessGroup | None,
        device: torch.device,
        every: int,
    ) -> None:
        self._weights = [weakref.ref(weight) for weight in weights]
        self._every = every
        self._hash = 0
        self._due = False
        self._steps = 0
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._group, self._device = group, device
        if dist.is_gloo_available():
            ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
            self._group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
            self._device = torch.device("cpu")

    def note(self, number: int, event: Event) -> None:
        """Add a change of weight ``number`` to the hash."""
        weight, slots = event.weight, event.slots
        if event.loaded or event.source is not None:
            words = [number, weight.fingerprint(), weight.connections]
        else:
            # A sum that depends on positions; cheap compared to the change itself.
            rows, cols = weight.rows[slots].long(), weight.cols[slots].long()
            mixed = (slots * 0x9E3779B1 + rows * 0x85EBCA77 + cols * 0xC2B2AE3D) ^ (rows << 20)
            words = [number, slots.numel(), int(mixed.sum().item())]
        for word in words:
            self._hash = (self._hash * 0x100000001B3 ^ word) & (random.SEED_BOUND - 1)

    def _mine(self) -> list[SparseWeight]:
        return [weight for found in self._weights if (weight := found()) is not None]

    def before_forward(self) -> None:
        """Note whether DDP will reduce gradients after this forward pass."""
        ddp: Any = DistributedDataParallel._get_active_ddp_module()
        if ddp is None:  # the model was called itself
            return
        if self._ddp is None or self._ddp() is not ddp:
            mine = {id(weight.rows) for weight in self._mine()}
            if any(id(buffer) in mine for buffer in ddp.modules_buffers):
                raise RuntimeError(
                    "DistributedDataParallel broadcasts the index of sparse weights: call "
                    "rewire.distributed.prepare(model) before wrapping, and wrap that very model"
                )
            self._ddp = weakref.ref(ddp)
        if ddp._join_config.enable and not ddp._join_config.throw_on_early_termination:
            ddp._authoritative_rank = _IN_JOIN
        elif torch.is_grad_enabled() and ddp.require_backward_grad_sync:
            self._due = True

    def before_step(self, optimizer: Optimizer) -> None:
        """Compare, if it is time and the optimizer trains one of the weights."""
        if not self._due:
            return
        mine = {id(weight.values) for weight in self._mine()}
        if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            return
        self._due = False
        self._steps += 1
        if self._steps % self._every == 0:
            self._compare(0)

    def meet(self, steps: int) -> int:
        """Compare, and return the largest number of steps of all ranks."""
        self.refuse_uneven()
        return self._compare(steps)

    def _compare(self, steps: int) -> int:
        # One all-reduce finds maximum and minimum: the maxima of x and of its complement.
        top = random.SEED_BOUND - 1
        found = torch.tensor([self._hash, top - self._hash, steps], device=self._device)
        try:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                "another rank did not come to this step, or has ended: all ranks must make the "
                "same optimizer steps and the same calls of end_epoch "
                f"({str(error).splitlines()[0]})"
            ) from error
        first, second, steps = found.tolist()
        if first != self._hash or second != top - self._hash:
            raise TopologyMismatch(_DIVERGED)
        return int(steps)

    def refuse_uneven(self) -> None:
        """Raise RuntimeError inside a Join, where ranks may make different numbers of steps."""
        ddp: Any = None if self._ddp is None else self._ddp()
        if ddp is not None and getattr(ddp, "_authoritative_rank", None) is _IN_JOIN:
            raise RuntimeError(_UNEVEN)

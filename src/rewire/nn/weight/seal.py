"""Whether a weight's values still belong to its positions: finds writes by other code.

After every change of its own, a weight takes a `Seal`: the tensors of its topology with their
version counters, which count in-place writes. A forward pass compares two counters. If they differ,
the contents are compared, because other code may have written the same positions again
(`AveragedModel` copies all buffers).
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rewire import random, topology
from rewire.topology import Index, TopologyError

__all__ = [
    "BROKEN",
    "Seal",
    "fed",
    "forget",
    "mark_of",
    "refusal",
    "seal_of",
    "unchanged",
    "written_once",
]

#: By averaging function (`rewire.ema`), or what stands for it: the copies of weights that it
#: updates.
_FED: dict[object, weakref.WeakSet[nn.Module]] = {}

#: Slots that `mark_of` reads at a time, so that it needs little memory.
_BLOCK = 1 << 18


class Seal(NamedTuple):
    """A topology at one moment: rows, cols and the lists by row, and the versions of all."""

    rows: Tensor
    cols: Tensor
    row_version: int
    col_version: int
    lists: tuple[Tensor, Tensor, Tensor]
    list_versions: tuple[int, int, int]


#: A seal that fits no topology.
BROKEN: Any = Seal(*(None,) * 6)  # type: ignore[arg-type]


def fed(feeder: object) -> weakref.WeakSet[nn.Module]:
    """The copies that the averaging function ``feeder`` updates; callers may add to the set."""
    return _FED.setdefault(feeder, weakref.WeakSet())


def forget(feeder: object) -> None:
    """Forget an averaging function that is gone."""
    _FED.pop(feeder, None)


def seal_of(rows: Tensor, cols: Tensor, index: Index) -> Seal | None:
    """The seal of this moment; None for inference tensors, which count no versions."""
    a, b, c = lists = index.row_ptr, index.row_cols, index.row_slots
    try:
        versions = a._version, b._version, c._version
        return Seal(rows, cols, rows._version, cols._version, lists, versions)
    except RuntimeError:
        return None


def mark_of(rows: Tensor, cols: Tensor) -> int | None:
    """A 63-bit hash of which connection is in which slot; None if contents cannot be read.

    Cost: O(capacity).
    """
    if not _readable(rows, cols):
        return None
    total = 0
    for start in range(0, rows.numel(), _BLOCK):
        r, c = rows[start : start + _BLOCK].long(), cols[start : start + _BLOCK].long()
        k = torch.arange(start, start + r.numel(), device=r.device)
        word = r * 0x9E3779B97F4A7C1 + c * 0x2545F4914F6CDD1D + k * 0x369DEA0F31A53F85
        word = (word ^ (word >> 29)) * 0x3F58476D1CE4E5B9
        total += int((word ^ (word >> 32)).sum().item())
    return total & (random.SEED_BOUND - 1)


def _readable(*tensors: Tensor) -> bool:
    """Whether these tensors have contents: not on the meta device, not fake, not inside a function
    transform.
    """
    return all(
        type(t) is Tensor
        and t.device.type != "meta"
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        for t in tensors
    )


def unchanged(
    seal: Seal | None,
    mark: int | None,
    rows: Tensor,
    cols: Tensor,
    index: Index,
    shape: tuple[int, int],
) -> bool:
    """Whether ``rows`` and ``cols``, which the seal does not fit, still hold what they held, and
    ``index`` fits them.

    ``mark`` tells, or else lists that nobody has written to. If all tensors were exchanged for
    others (`torch.func.functional_call` with the buffers of another model), these must fit each
    other only. Also True if contents cannot be read. Cost: builds an index, O(K log K).
    """
    if not _readable(rows, cols, *index):
        return True
    lists = (index.row_ptr, index.row_cols, index.row_slots)
    if seal is None:  # inference tensors have no versions: at least their contents must fit
        return rows.is_inference() or _fits(rows, cols, index, shape)
    exchanged = rows is not seal.rows and cols is not seal.cols
    exchanged = exchanged and not any(a is b for a, b in zip(lists, seal.lists, strict=True))
    if not exchanged:
        same_objects = all(a is b for a, b in zip(lists, seal.lists, strict=True))
        untouched = same_objects and all(
            a._version == n for a, n in zip(lists, seal.list_versions, strict=True)
        )
        if not untouched and (mark is None or mark_of(rows, cols) != mark):
            return False
    return _fits(rows, cols, index, shape)


def _fits(rows: Tensor, cols: Tensor, index: Index, shape: tuple[int, int]) -> bool:
    """Whether the lists are those of these positions."""
    if rows.shape != cols.shape or rows.dim() != 1:
        return False
    try:
        fresh = topology.build_index(rows, cols, *shape)
    except TopologyError:
        return False
    return all(torch.equal(mine, other.to(mine)) for mine, other in zip(fresh, index, strict=True))


def written_once(
    seal: Seal | None, rows: Tensor, cols: Tensor, index: Index, shape: tuple[int, int]
) -> bool:
    """Whether every tensor has been written exactly once since the seal, and all fit together."""
    if seal is None or rows is not seal.rows or cols is not seal.cols:
        return False
    lists = (index.row_ptr, index.row_cols, index.row_slots)
    versions = (rows._version, cols._version, *(a._version for a in lists))
    before = (seal.row_version, seal.col_version, *seal.list_versions)
    once = all(now == was + 1 for now, was in zip(versions, before, strict=True))
    return once and _fits(rows, cols, index, shape)


def refusal(shape: tuple[int, ...]) -> TopologyError:
    """The error to raise when other code has written positions."""
    return TopologyError(
        f"the positions of a sparse weight of shape {shape} were written by other code, so its "
        "values belong to other connections: averages over state_dict() or buffers, and copies "
        "tensor by tensor, mix connections slot by slot. Average with "
        "rewire.ema.ExponentialMovingAverage, or with torch.optim.swa_utils.AveragedModel(model, "
        "multi_avg_fn=rewire.ema.get_ema_multi_avg_fn(model)); copy with load_state_dict or "
        "copy.deepcopy; for DistributedDataParallel call rewire.distributed.prepare(model) first"
    )

"""Whether a pool's positions are still those that its values belong to: writes behind its back are
found.

Every change that a pool makes itself is followed by a `Seal`: the tensors of its topology with
their version counters, which every in-place write moves. A forward pass compares two counters. Only
where they differ the contents are looked at, because the same positions may have been written again
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

#: Copies of pools that an averaging function feeds, by what stands for it (`rewire.ema`).
_FED: dict[object, weakref.WeakSet[nn.Module]] = {}

#: Slots that `mark_of` reads at a time, so that it needs no memory to speak of.
_BLOCK = 1 << 18


class Seal(NamedTuple):
    """A topology at one moment: rows, cols, their versions, the lists by row, and the versions of
    those.
    """

    rows: Tensor
    cols: Tensor
    row_version: int
    col_version: int
    lists: tuple[Tensor, Tensor, Tensor]
    list_versions: tuple[int, int, int]


#: What no topology fits.
BROKEN: Any = Seal(*(None,) * 6)  # type: ignore[arg-type]


def fed(feeder: object) -> weakref.WeakSet[nn.Module]:
    """The pools that are copies of one fed by ``feeder``; may be added to."""
    return _FED.setdefault(feeder, weakref.WeakSet())


def forget(feeder: object) -> None:
    """There is nothing any more that feeds."""
    _FED.pop(feeder, None)


def seal_of(rows: Tensor, cols: Tensor, index: Index) -> Seal | None:
    """The seal of this moment; None for inference tensors, which count no versions."""
    a, b, c = index.row_ptr, index.row_cols, index.row_slots
    try:
        return Seal(
            rows,
            cols,
            rows._version,
            cols._version,
            (a, b, c),
            (a._version, b._version, c._version),
        )
    except RuntimeError:
        return None


def mark_of(rows: Tensor, cols: Tensor) -> int | None:
    """A 63-bit hash of which connection is in which slot; None where contents cannot be read. Cost:
    O(capacity).
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
    """Whether these are ordinary tensors with contents: not on meta, not fake, not inside a
    function transform.
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
    """Whether ``rows`` and ``cols``, which the seal does not fit, still say what they said, and
    ``index`` fits them.

    Known by ``mark``, or else by lists that nobody has touched. Tensors that were all exchanged for
    others (`torch.func.functional_call` with the buffers of another model) must fit one another
    only. True as well where contents cannot be read. Cost: an index is built, O(K log K).
    """
    if not _readable(rows, cols, *index):
        return True
    lists = (index.row_ptr, index.row_cols, index.row_slots)
    if seal is None:  # inference tensors cannot be followed: what they hold must at least fit
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
    """Whether every tensor has been written exactly once since the seal, and what was written is
    one topology.
    """
    if seal is None or rows is not seal.rows or cols is not seal.cols:
        return False
    lists = (index.row_ptr, index.row_cols, index.row_slots)
    versions = (rows._version, cols._version, *(a._version for a in lists))
    before = (seal.row_version, seal.col_version, *seal.list_versions)
    once = all(now == was + 1 for now, was in zip(versions, before, strict=True))
    return once and _fits(rows, cols, index, shape)


def refusal(shape: tuple[int, ...]) -> TopologyError:
    """What to say where positions were written that the values do not belong to."""
    return TopologyError(
        f"the positions of a sparse weight of shape {shape} were written behind its back, so its "
        "values belong to other connections: averages over state_dict() or buffers, and copies "
        "tensor by tensor, mix connections slot by slot. Average with "
        "rewire.ema.ExponentialMovingAverage, or with torch.optim.swa_utils.AveragedModel(model, "
        "multi_avg_fn=rewire.ema.get_ema_multi_avg_fn(model)); copy with load_state_dict or "
        "copy.deepcopy; for DistributedDataParallel call rewire.distributed.prepare(model) first"
    )

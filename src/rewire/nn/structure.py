"""Changes of a model's structure: parameters that shrink, become pools or mean something else, and
who is told of them.

A pool tells its followers itself (`rewire.nn.weight.events`). This is the same for all other
parameters: whatever cuts, replaces or rescales one announces it here, and what keeps numbers for
each of its entries (a weight average) follows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from rewire.nn.weight.pool import SparseWeight

__all__ = ["Part", "StructureFollower", "announce", "follow_structure"]


@dataclass(frozen=True)
class Part:
    """A parameter that holds (some of) what another one held, or what it held itself in another
    shape or scale.

    parameter: with its new contents. take: what a tensor that goes with the old contents, entry by
        entry, is now; None
    where nothing goes on and numbers kept for each entry start afresh, from what the parameter
    holds when they are needed next. weight: the pool whose values these are, if they are.
    """

    parameter: Tensor
    take: Callable[[Tensor], Tensor] | None = None
    weight: SparseWeight | None = None


#: Told of the parameter that changed and of what there is in its place.
StructureFollower = Callable[[Tensor, Sequence[Part]], None]

_FOLLOWERS = WeakTensorKeyDictionary()


def follow_structure(parameter: Tensor, follower: StructureFollower) -> RemovableHandle:
    """Tell ``follower`` whenever ``parameter`` is cut, replaced or rescaled; ``.remove()`` on the
    handle ends it.

    Followers belong to the tensor object: copies have none.
    """
    followers = _FOLLOWERS.get(parameter)
    if followers is None:
        followers = _FOLLOWERS[parameter] = OrderedDict()  # a plain dict takes no weak references
    handle = RemovableHandle(followers)
    followers[handle.id] = follower
    return handle


def announce(parameter: Tensor, parts: Sequence[Part]) -> None:
    """Tell all that follow ``parameter`` that its contents are those of ``parts`` now. Call it when
    that is done.
    """
    for follower in tuple((_FOLLOWERS.get(parameter) or {}).values()):
        follower(parameter, parts)

"""Changes of a model's structure: parameters that shrink, become sparse weights or change scale.

A sparse weight tells its followers itself (`rewire.nn.weight.events`). For other parameters,
whatever cuts, replaces or rescales one announces it here, and whatever keeps a number for each
entry (a weight average) follows.
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
    """A parameter that holds contents of an old one, or its own contents in another shape or scale.

    parameter: with its new contents.
    take: (a tensor with a number for each entry of the old contents) -> the same for the new
        contents; None if such numbers start afresh, from the parameter's contents when they are
        needed next.
    weight: the sparse weight, if these are the values of one.
    """

    parameter: Tensor
    take: Callable[[Tensor], Tensor] | None = None
    weight: SparseWeight | None = None


#: Called with the parameter that changed and what is in its place.
StructureFollower = Callable[[Tensor, Sequence[Part]], None]

_FOLLOWERS = WeakTensorKeyDictionary()


def follow_structure(parameter: Tensor, follower: StructureFollower) -> RemovableHandle:
    """Tell ``follower`` when ``parameter`` is cut, replaced or rescaled; ``.remove()`` ends it.

    Followers belong to the tensor object: copies do not have them.
    """
    followers = _FOLLOWERS.get(parameter)
    if followers is None:
        followers = _FOLLOWERS[parameter] = OrderedDict()  # handles refer to it weakly
    handle = RemovableHandle(followers)
    followers[handle.id] = follower
    return handle


def announce(parameter: Tensor, parts: Sequence[Part]) -> None:
    """Tell the followers of ``parameter`` that ``parts`` hold its contents; call it afterwards."""
    for follower in tuple((_FOLLOWERS.get(parameter) or {}).values()):
        follower(parameter, parts)

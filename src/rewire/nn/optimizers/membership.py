"""What optimizers have of a parameter: its places in their groups, and its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Home", "homes_of", "only_home", "split_state"]


class Home(NamedTuple):
    """Where a parameter is: entry ``place`` of parameter group ``group``."""

    optimizer: Optimizer
    group: int
    place: int


def homes_of(parameter: Tensor | None, optimizers: Iterable[Optimizer]) -> list[Home]:
    """Every place of ``parameter`` in the groups of the optimizers themselves."""
    return [
        Home(optimizer, i, k)
        for optimizer in optimizers
        for i, group in enumerate(optimizer.param_groups)
        for k, member in enumerate(group["params"])
        if member is parameter
    ]


def only_home(name: str, homes: Sequence[Home], make: str, instead: str = "") -> Home:
    """The only one of ``homes``.

    Raises ValueError for no place or several. Its text calls the parameter ``name``, says how to
    ``make`` the optimizer and what to do ``instead``.
    """
    if len(homes) != 1:
        where = "in no optimizer" if not homes else f"in {len(homes)} parameter groups"
        raise ValueError(
            f"{name} is {where}, and must be in exactly one: make the optimizer {make} and pass "
            f"all optimizers to the method{instead}"
        )
    return homes[0]


def split_state(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    fits: Callable[[str, Tensor], bool],
    what: str,
    change: tuple[str, str],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a parameter in two parts: the tensors that have a number for each of its
    entries, as ``fits`` (key, tensor) tells, and the rest.

    Raises ValueError for any other tensor that is not a single number. Its text says ``what`` the
    tensor is kept for and names the ``change`` ("cut", "the cut") that it cannot follow.
    """
    entries: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            rest[key] = value
        elif fits(key, value):
            entries[key] = value
        elif value.dim():
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for {what}, "
                f"which cannot be {change[0]} along with it: use SGD or Adam, or make a new "
                f"optimizer after {change[1]}"
            )
        else:
            rest[key] = value
    return entries, rest

"""What a method refuses at construction, whatever its kind."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rewire import random
from rewire.methods.core.pool import Pool
from rewire.nn import SparseWeight
from rewire.nn.layers.adapted import Adapted
from rewire.nn.weight.sharded import refuse_sharded

__all__ = [
    "agreed_seed",
    "needs_data",
    "refuse_full",
    "refuse_limits",
    "refuse_model",
    "refuse_prior",
    "refuse_weight_decay",
]

#: Weights that an error names; the others it counts.
_NAMED = 5


def agreed_seed(given: int | None, weights: Sequence[SparseWeight]) -> int:
    """``given``, or what the ranks agreed on, or a number from torch's default generator.

    Raises ValueError for a seed out of range.
    """
    if given is None:
        agreed = weights[0].shared_seed if weights else None
        given = random.seed_from() if agreed is None else agreed
    if not 0 <= given < random.SEED_BOUND:
        raise ValueError(f"seed must be between 0 and 2**63 - 1, not {given}")
    return given


def needs_data(method: object) -> ValueError:
    """The error of a method that was made without ``data=``."""
    return ValueError(
        f"{type(method).__name__} looks at activations: give it data=, batches of training inputs"
    )


def refuse_model(model: nn.Module, method: str, *, dense: bool) -> None:
    """RuntimeError for sharded sparse weights; ValueError for differences beside dense weights
    (`rewire.adapt`) if the method starts from ``dense`` layers.
    """
    refuse_sharded(model)
    for name, module in model.named_modules() if dense else ():
        if isinstance(module, Adapted):
            raise ValueError(
                f"{method} starts from dense layers, and {name or 'the model'} has a sparse "
                "difference beside its weight: merge() the adapter first, or choose a method that "
                "rewires sparse weights, such as RigL or SET"
            )


def refuse_limits(pools: Sequence[Pool], kept: Sequence[str], method: str) -> None:
    """ValueError if a pool is limited in a way that ``method`` does not keep."""
    for pool in pools:
        kinds = pool.weight.limits.kinds if pool.weight.limits is not None else ()
        broken = [kind for kind in kinds if kind not in kept]
        if broken:
            raise ValueError(
                f"{pool.name} is limited to {pool.weight.limits}, and {method} with these settings "
                f"does not keep a limit on {' and '.join(broken)}: `rewire methods NAME` says what "
                "a method keeps"
            )


def refuse_prior(pools: Sequence[Pool], kept: Sequence[str], method: str) -> None:
    """ValueError if a pool has a prior that ``method`` does not keep."""
    words = {"allowed": "allowed positions", "frozen": "frozen connections"}
    for pool in pools:
        kinds = pool.weight.prior.kinds if pool.weight.prior is not None else ()
        broken = [words[kind] for kind in kinds if kind not in kept]
        if broken:
            raise ValueError(
                f"{pool.name} has {pool.weight.prior}, and {method} with these settings does not "
                f"keep {' and '.join(broken)}: `rewire methods NAME` says what a method keeps"
            )


def refuse_full(pools: Sequence[Pool], method: str) -> None:
    """ValueError if no pool has a dormant position, or no connection that may go."""
    room = [pool for pool in pools if pool.weight.dormant]
    if any(pool.may_go().numel() for pool in room):
        return
    if room:
        raise ValueError(
            f"{method} has nothing to rewire, because all connections of "
            f"{', '.join(pool.name for pool in room)} are frozen: let some of them go, or use "
            "Static"
        )
    shown = [f"{p.name} (K = {p.weight.connections} of {_potential(p.weight)})" for p in pools]
    if len(shown) > _NAMED:
        shown[_NAMED:] = [f"{len(shown) - _NAMED} others"]
    raise ValueError(
        f"{method} has nothing to rewire, because every weight has all of its connections: "
        f"{', '.join(shown)}; give one of them fewer at least (density= or connections=), "
        "or use Static"
    )


def _potential(weight: SparseWeight) -> str:
    own = weight.positions
    return f"M = {own}" if own == weight.size else f"{own} allowed positions"


def refuse_weight_decay(pools: Sequence[Pool], method: str) -> None:
    """ValueError if an optimizer decays the values of a pool."""
    for pool in pools:
        if float(pool.group.get("weight_decay", 0)) != 0:
            raise ValueError(
                f"{method} must not be combined with weight decay on sparse values, and the "
                f"optimizer decays {pool.name} by {pool.group['weight_decay']}: make it with "
                "rewire.param_groups(model, weight_decay, decay_sparse=False), or without weight "
                "decay"
            )

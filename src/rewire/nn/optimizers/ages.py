"""Adam and its relatives on connections that grew later: each gets the bias correction of its own
age.

Adam divides its moments by ``1 - beta ** step``, because they began at 0. The moments of a
connection that grows at step 1000 begin at 0 too, but `torch.optim` has one step for the whole
parameter, so the connection's first update is ``(1 - beta1) / sqrt(1 - beta2)`` = 3.16 times the
rate. Here every connection that grew has an *age*, the number of steps it has taken. Ages are one
more tensor of the optimizer's state (`KEY`), so they are saved, loaded, moved, cut and reset with
the moments.

The moments themselves do not depend on the step, only the update made of them does. So the
optimizer steps as always, and then the values of young connections move by the difference between
the update for their own age and the optimizer's update.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Adam, Adamax, NAdam, Optimizer, RAdam

from rewire.ops.aging import Tables, age_step_

if TYPE_CHECKING:
    from rewire.nn.weight.pool import SparseWeight

__all__ = ["KEY", "Ages", "Moments", "ages_of", "cannot_age", "looks_biased", "start_ages"]

#: The bias correction of grown connections (`rewire.nn.follow_optimizer`).
Moments = Literal["auto", "aged", "cleared"]

#: The name of the ages in the optimizer's state: the steps that a connection has taken since it
#: grew, as unsigned 16 bits per slot (32 if correction takes longer); all bits are ones where the
#: optimizer's own step counts.
KEY = "age"

_OLD = -1
#: The most that 16 bits can count.
_LONGEST_SHORT = 0xFFFE
_LONGEST = 0x7FFFFFFE


# --- what each optimizer makes of its moments -----------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """How an optimizer updates values from moments: ``w <- decay w - lr (m[age] m + g[age] grad) /
    (root[age] sqrt(v) + eps[age])``.

    second: the name of v in the state.
    squared: whether the square root of v is taken.
    gradient: whether g is not 0.
    tables: (parameter group, ages as float64, dtype of the optimizer's counters) -> m, g, root, eps
        by age.
    horizon: (parameter group, precision) -> the age from which these equal those of infinite age.
    """

    second: Callable[[Mapping[str, Any]], str]
    squared: bool
    gradient: bool
    tables: Callable[[Mapping[str, Any], np.ndarray, Any], tuple[Any, Any, Any, Any]]
    horizon: Callable[[Mapping[str, Any], float], float]


def _betas(group: Mapping[str, Any]) -> tuple[float, float]:
    one, two = group["betas"]
    return float(one), float(two)


def _fades(beta: float, precision: float) -> float:
    """The n from which ``beta ** n`` is below ``precision``."""
    return math.log(precision) / math.log(beta) if beta > 0 else 1.0


def _adam(group: Mapping[str, Any], age: np.ndarray, counters: Any) -> tuple[Any, Any, Any, Any]:
    one, two = _betas(group)
    return 1 / (1 - one**age), 0.0, 1 / np.sqrt(1 - two**age), float(group["eps"])


def _both(group: Mapping[str, Any], precision: float) -> float:
    return max(_fades(beta, precision) for beta in _betas(group))


def _nadam(group: Mapping[str, Any], age: np.ndarray, counters: Any) -> tuple[Any, Any, Any, Any]:
    one, two = _betas(group)
    decay = float(group["momentum_decay"])
    mu = one * (1.0 - 0.5 * 0.96 ** (np.append(age, age[-1] + 1) * decay))
    product = np.cumprod(mu[:-1].astype(counters)).astype(np.float64)  # rounded as in the optimizer
    now, following = mu[:-1], mu[1:]
    m = following / (1.0 - product * following)
    return m, (1.0 - now) / (1.0 - product), 1 / np.sqrt(1 - two**age), float(group["eps"])


def _nadam_now(
    group: Mapping[str, Any], state: Mapping[str, Any], step: int
) -> tuple[float, float, float, float]:
    """m, g, root and eps of the optimizer's own step, from the product of mu in its state."""
    one, two = _betas(group)
    now, following = (
        one * (1.0 - 0.5 * 0.96 ** (t * float(group["momentum_decay"]))) for t in (step, step + 1)
    )
    product = float(state["mu_product"])
    m, g = following / (1.0 - product * following), (1.0 - now) / (1.0 - product)
    return m, g, 1.0 / math.sqrt(1.0 - two**step), float(group["eps"])


def _nadam_horizon(group: Mapping[str, Any], precision: float) -> float:
    # The schedule of mu takes 10^5 steps, but its end hardly matters: it shifts weight from the
    # moment, which averages the gradient, to the gradient. tests/nn/optimizers/test_ages.py
    # measures the error.
    schedule = _fades(0.96 ** float(group["momentum_decay"]), precision)
    return max(_both(group, precision), min(schedule, _LONGEST_SHORT))


def _radam(group: Mapping[str, Any], age: np.ndarray, counters: Any) -> tuple[Any, Any, Any, Any]:
    one, two = _betas(group)
    power = two**age
    longest = 2 / (1 - two) - 1
    rho = longest - 2 * age * power / (1 - power)
    rectified = rho > 5.0
    rho = np.where(rectified, rho, 6.0)
    factor = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
    factor = np.sqrt(np.where(rectified, factor, 1.0)) * np.sqrt(1 - power)
    m = np.where(rectified, factor, 1.0) / (1 - one**age)
    return m, 0.0, np.where(rectified, 1.0, 0.0), np.where(rectified, float(group["eps"]), 1.0)


def _radam_horizon(group: Mapping[str, Any], precision: float) -> float:
    # rho has a factor of the age: n (1 - beta) beta ** n.
    two = _betas(group)[1]
    return max(_both(group, precision), _fades(two, precision / max(1.0, -math.log(precision))))


def _adamax(group: Mapping[str, Any], age: np.ndarray, counters: Any) -> tuple[Any, Any, Any, Any]:
    return 1 / (1 - _betas(group)[0] ** age), 0.0, 1.0, 0.0


def _first_only(group: Mapping[str, Any], precision: float) -> float:
    return _fades(_betas(group)[0], precision)


def _variance(group: Mapping[str, Any]) -> str:
    return "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"


_RULES: dict[type[Optimizer], _Rule] = {
    Adam: _Rule(_variance, True, False, _adam, _both),  # AdamW is a subclass
    NAdam: _Rule(lambda group: "exp_avg_sq", True, True, _nadam, _nadam_horizon),
    RAdam: _Rule(lambda group: "exp_avg_sq", True, False, _radam, _radam_horizon),
    Adamax: _Rule(lambda group: "exp_inf", False, False, _adamax, _first_only),
}


def _own_step(kind: type[Optimizer], base: type[Optimizer]) -> bool:
    names = ("step", "_init_group")
    return any(
        inspect.unwrap(getattr(kind, n)) is not inspect.unwrap(getattr(base, n)) for n in names
    )


#: A cache of `_rule`.
_FOUND: dict[Any, _Rule | None] = {}


def _rule(kind: type[Optimizer]) -> _Rule | None:
    if kind not in _FOUND:
        base = next((base for base in _RULES if issubclass(kind, base)), None)
        _FOUND[kind] = None if base is None or _own_step(kind, base) else _RULES[base]
    return _FOUND[kind]


def cannot_age(optimizer: Optimizer) -> str | None:
    """Why this optimizer does not support ages; None if it does."""
    name = type(optimizer).__name__
    if _rule(type(optimizer)) is None:
        if isinstance(optimizer, tuple(_RULES)):
            return f"{name} has a step() of its own, whose rule is not known"
        return f"the rule of {name} is not known"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return f"{name} was made with differentiable=True, and its step must not be touched then"
    return None


def looks_biased(state: Mapping[str, Any]) -> bool:
    """Whether this seems to be the state of a relative of Adam, with updates that depend on a
    step.
    """
    return "step" in state and ("exp_avg" in state or "exp_avg_sq" in state)


# --- the ages -------------------------------------------------------------------------------------


def _precision(dtype: torch.dtype) -> float:
    """Corrections that differ from 1 by less than this are lost in rounding."""
    return torch.finfo(dtype).eps / 4


def _horizon(rule: _Rule, group: Mapping[str, Any], dtype: torch.dtype) -> int:
    longest = _LONGEST if torch.finfo(dtype).bits > 16 else _LONGEST_SHORT
    return min(math.ceil(rule.horizon(group, _precision(dtype))) + 1, longest)


def ages_of(state: dict[Any, Any], parameter: Tensor, horizon: int = 0) -> Tensor | None:
    """The ages in an optimizer's state of a weight (int16 or int32; write to them in place), if
    there are any.

    ``optimizer.load_state_dict`` converts all state to the parameter's dtype; this converts it
    back. For values of 16 bits, whose dtype could not represent such numbers, the state keeps the
    bits of the ages under that dtype.
    """
    kept = state.get(KEY)
    if kept is None:
        return None
    ages: Tensor = kept
    if ages.dtype not in (torch.int16, torch.int32):
        if ages.element_size() == 2:
            return ages.view(torch.int16)
        wide = bool(ages.numel()) and float(ages.max()) > 0x7FFF
        ages = ages.to(torch.int32 if wide or horizon > _LONGEST_SHORT else torch.int16)
        state[KEY] = ages
    if horizon > _LONGEST_SHORT and ages.dtype == torch.int16:
        wider = ages.int() & 0xFFFF
        state[KEY] = ages = wider.masked_fill_(wider == 0xFFFF, _OLD)
    return ages


def start_ages(optimizer: Optimizer, weight: SparseWeight, slots: Tensor, *, moved: bool) -> bool:
    """Let the connections in ``slots``, whose other state has been reset already, start at age 0.

    Empty slots have no age. ``moved``: the whole pool has moved. Returns whether the optimizer's
    state has ages now. An optimizer without state needs none, because its first step is the first
    step of all connections.
    """
    parameter = weight.values
    state = optimizer.state.get(parameter)
    if not state or not isinstance(state.get("step"), Tensor):
        return False
    rows = weight.rows
    full = weight.connections == rows.numel()
    ages = ages_of(state, parameter)
    if ages is None:
        if not slots.numel() or not (full or bool((rows[slots] >= 0).any())):
            return False
        group = _group(optimizer, parameter)
        rule = _rule(type(optimizer))
        assert rule is not None
        narrow = parameter.element_size() == 2
        short = narrow or _horizon(rule, group, parameter.dtype) <= _LONGEST_SHORT
        ages = torch.full_like(rows, _OLD, dtype=torch.int16 if short else torch.int32)
        state[KEY] = ages.view(parameter.dtype) if narrow else ages
        ages.index_fill_(0, slots, 0)
    if not full:
        empty = (rows < 0).nonzero().flatten() if moved else slots[rows[slots] < 0]
        ages.index_fill_(0, empty, _OLD)
    return True


def _group(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


@dataclass
class _Watched:
    """The values of a weight, who asked to watch them, and what is known of them between steps."""

    parameter: Tensor
    users: set[int]
    settled: Tensor | None = None  # ages that are all old
    counter: float | None = None  # the optimizer's step at the last correction
    # the optimizer's list of groups, and the parameter's group
    group: tuple[Any, dict[str, Any]] | None = None


#: The `Ages` of each optimizer.
_AGES: weakref.WeakKeyDictionary[Optimizer, Ages] = weakref.WeakKeyDictionary()


class Ages:
    """Corrects the updates of young connections after each step of one optimizer, by a hook.

    A connection is old once its correction equals the optimizer's own up to rounding. Holds the
    optimizer weakly. Cost of a step: one comparison if no connection is young, else a pass over the
    ages and work for the young connections.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._pools: dict[int, _Watched] = {}
        self._tables: dict[Any, tuple[Any, tuple[int, Tables, Any]]] = {}
        self._handle = optimizer.register_step_post_hook(self._after)

    @classmethod
    def watch(cls, optimizer: Optimizer, parameter: Tensor, user: int) -> None:
        """Correct ``parameter`` after each step until ``user`` calls `leave`; may be repeated."""
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            return
        ages = _AGES.get(optimizer)
        if ages is None:
            ages = _AGES[optimizer] = cls(optimizer)
        watched = ages._pools.setdefault(id(parameter), _Watched(parameter, set()))
        watched.users.add(user)
        watched.settled = None
        state = optimizer.state.get(parameter)
        watched.counter = float(state["step"]) if state and KEY in state else None

    @classmethod
    def leave(cls, optimizer: Optimizer, parameter: Tensor, user: int) -> None:
        """End `watch`; the last one to leave removes the hook."""
        ages = _AGES.get(optimizer)
        watched = None if ages is None else ages._pools.get(id(parameter))
        if ages is None or watched is None:
            return
        watched.users.discard(user)
        if not watched.users:
            del ages._pools[id(parameter)]
        if not ages._pools:
            ages._handle.remove()
            del _AGES[optimizer]

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for watched in self._pools.values():
            state = optimizer.state.get(watched.parameter)
            if not state or KEY not in state or state[KEY] is watched.settled:
                continue
            before, watched.counter = watched.counter, float(state["step"])
            # The counter stands still if the parameter took no part, or a GradScaler skipped the
            # step.
            stepped = before != watched.counter
            if before is None:
                stepped = watched.parameter.grad is not None
            if stepped and not self._correct(optimizer, watched, state):
                watched.settled = state[KEY]

    def _correct(self, optimizer: Optimizer, watched: _Watched, state: dict[Any, Any]) -> int:
        """Correct the last update of young connections; returns how many are still young."""
        rule = _rule(type(optimizer))
        assert rule is not None
        parameter, groups = watched.parameter, optimizer.param_groups
        if watched.group is None or watched.group[0] is not groups or len(groups) > 1:
            watched.group = groups, _group(optimizer, parameter)
        group = watched.group[1]
        horizon, tables, own = self._made(rule, group, parameter, state, int(watched.counter or 0))
        ages = ages_of(state, parameter, horizon)
        assert ages is not None
        young = age_step_(
            ages,
            parameter,
            state["exp_avg"],
            state[rule.second(group)],
            parameter.grad if rule.gradient else None,
            tables,
            own,
            lr=float(group["lr"]),
            decay=0.0 if group.get("decoupled_weight_decay") else float(group["weight_decay"]),
            maximize=bool(group["maximize"]),
            squared=rule.squared,
            horizon=horizon,
        )
        increment_version([parameter])
        return young

    def _made(
        self,
        rule: _Rule,
        group: Mapping[str, Any],
        parameter: Tensor,
        state: Mapping[str, Any],
        step: int,
    ) -> tuple[int, Tables, tuple[float, float, float, float]]:
        """The horizon, the tables by age, and the four factors of the optimizer's own ``step``.

        Horizon and tables are made anew only if the group's numbers have changed.
        """
        # No connection is older than the optimizer, so tables are as long as the next power of two
        # above its step.
        longest = 1 << max(10, step.bit_length())
        numbers = _betas(group), group["eps"], group.get("momentum_decay"), longest
        place = rule, parameter.dtype, parameter.device
        known = self._tables.get(place)
        if known is None or known[0] != numbers:
            horizon = _horizon(rule, group, parameter.dtype)
            length = min(longest, horizon)
            wide = getattr(state.get("mu_product"), "dtype", None) == torch.float64
            counters = np.float64 if wide else np.float32
            lists = rule.tables(group, np.arange(1, length + 1, dtype=np.float64), counters)
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            rows = np.stack([np.broadcast_to(x, length) for x in lists])
            made = [torch.as_tensor(row.copy()).to(parameter.device, dtype) for row in rows]
            known = self._tables[place] = numbers, (horizon, Tables(*made), rows)
        horizon, tables, rows = known[1]
        if rule.gradient and step > rows.shape[1]:  # NAdam's schedule is longer than its table
            return horizon, tables, _nadam_now(group, state, step)
        m, g, root, eps = rows[:, min(step, rows.shape[1]) - 1].tolist()
        return horizon, tables, (m, g, root, eps)

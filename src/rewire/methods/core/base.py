"""The protocol every method follows, and the services that all of them share."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire import random
from rewire.distributed import agree, refuse_unprepared
from rewire.methods.core.attachment import (
    Attachment,
    Pool,
    Purpose,
    gradient_scale,
    only,
    trained_weights,
)
from rewire.nn import Moments
from rewire.nn.weight.sharded import refuse_sharded

__all__ = ["Attachment", "Data", "Evaluate", "Method", "Moments", "Pool", "Purpose", "only"]

#: Optional argument of `Method.end_epoch`: model -> score.
Evaluate = Callable[[nn.Module], float]

#: Training data for methods that look at activations (parameter ``data`` of their constructors): an
#: iterable that can be gone through again and again, of batches, each the input or a tuple or list
#: that begins with it.
Data = Iterable[Any]

#: Weights that an error names; the others it counts.
_NAMED = 5


_NO_COPY = (
    "a method is tied to its model and optimizer and cannot be copied or pickled: copy those, "
    "make a new method for "
    "them and give it this one's state_dict()"
)


class Method(ABC):
    """A way of finding connections while training; the interface of all methods.

    Call `penalty` in the loss, `step` after ``optimizer.step()`` (before a learning-rate
    scheduler's), `end_epoch` after each epoch, and `finalize` at the end. A method is written by
    overriding `_after_step` and, where needed, `_after_epoch`, `_wants_capture`, `_state` and
    `_load_state`; everything else is the same for all of them.

    A method that moves connections at a fixed budget (`needs_room`) raises ValueError where none of
    its weights has a dormant position. A full one beside others, as ERK makes of small layers, is
    fine: it keeps its connections.

    Args of every method:
        model: with at least one sparse weight.
        optimizer: the one (or several) that trains every pool, made before.
        seed: of the method's own random numbers; by default the seed that the ranks agreed on
            (`rewire.distributed.prepare`), else drawn from torch's default generator.
    """

    #: Set where a paper forbids decay of sparse values; construction then refuses an optimizer that
    #: has it.
    forbids_weight_decay: ClassVar[bool] = False
    #: Slots of a pool of at least this many connections are sorted again once as many have grown as
    #: there are. Before, the whole pool lies in cache and their order costs nothing; sorted, a
    #: large layer's step is 5 to 15 % faster.
    sort_from: ClassVar[int] = 1 << 16
    #: Set by methods that start from an ordinary dense model and need no sparse weights in it.
    starts_dense: ClassVar[bool] = False
    #: Set by methods that end with fewer connections than they start with
    #: (`rewire.methods.pruning.shrink`): the density to build the pools with, 1 for all potential
    #: connections. None: the pools are built at their budget.
    start_density: ClassVar[float | None] = None
    #: Whether ranks of DDP that train the same values come to the same decisions.
    acts_in_ranks: ClassVar[bool] = True
    #: The kinds of limits (`rewire.budget.Limits`) that the method keeps; others are refused at
    #: construction.
    keeps_limits: ClassVar[tuple[str, ...]] = ()
    #: The optimizer of `rewire train` where the user names none, and its rate; None for the usual
    #: one of the optimizer.
    run_optimizer: ClassVar[str] = "adam"
    run_lr: ClassVar[float | None] = None

    @classmethod
    def run_options(cls, epochs: int, given: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
        """Hyper-parameters that `rewire train` sets in a run of ``epochs`` where the user, who gave
        ``given``, did not.

        For what has no good value that is independent of the length of a run and of the
        ``optimizer``.
        """
        return {}

    #: Set by methods that move connections at a fixed budget: refused where no weight has a
    #: position to move one to.
    needs_room: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        moments: Moments = "auto",
        seed: int | None = None,
    ) -> None:
        self.model = model
        refuse_sharded(model)
        refuse_unprepared(
            model,
            trained_weights(model, optimizer),
            type(self).__name__,
            in_ranks=self.acts_in_ranks,
        )
        self.moments: str = moments
        self._attachment = Attachment(model, optimizer, dense=self.starts_dense, moments=moments)
        self.optimizers = self._attachment.optimizers
        self.pools = self._attachment.pools
        if seed is None:
            agreed = self.pools[0].weight.shared_seed if self.pools else None
            seed = random.seed_from() if agreed is None else agreed
        if not 0 <= seed < random.SEED_BOUND:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, not {seed}")
        self.seed = seed
        self.steps = 0
        self.epochs = 0
        self.updates = 0
        self._warned = False
        self._dropped = {pool.name: 0 for pool in self.pools}
        self._grown = {pool.name: 0 for pool in self.pools}
        self._sorted = dict(self._grown)  # how many had grown when the slots were last sorted
        self._records = False  # whether a step was ever asked for
        self._refuse_limits()
        if self.needs_room:
            self._refuse_full()
        if self.forbids_weight_decay:
            self._refuse_weight_decay()
        self._request_capture()

    # --- what users call --------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """The method's own term of the loss (a scalar); 0 for methods that act in `step`."""
        return torch.zeros((), device=self.optimizers[0].param_groups[0]["params"][0].device)

    @final
    @torch.no_grad()
    def step(self) -> None:
        """Act on the optimizer step just made; after a step that was skipped (GradScaler) this does
        nothing.
        """
        self._check_attached()
        self._attachment.look()
        pools, moved = self._attachment.take(), self._attachment.moved()
        if not (pools or (self.starts_dense and moved)):
            if not moved:
                self._attachment.idle()
            self._request_capture()  # what is recorded stays for as long as it is in .grad
            return
        self.steps += 1
        if len(pools) == len(self.pools):
            self._after_step(pools)
        else:
            self._attachment.missed(pools)
            self._after_step(pools)
            self._attachment.acted()
        self._tidy()
        self._release(pools)
        self._request_capture()

    @final
    @torch.no_grad()
    def end_epoch(self, evaluate: Evaluate | None = None, *, last: bool = False) -> None:
        """Act on the end of an epoch.

        ``evaluate`` (model -> score) is for methods that decide by it. ``last`` says that no
        training follows: methods whose paper does not rewire after the last epoch then leave the
        topology alone.
        """
        self._check_attached()
        self._attachment.look()
        skipped = self._attachment.end_epoch()
        if skipped:
            warnings.warn(
                f"{type(self).__name__}: none of the {skipped} optimizer steps of this epoch was "
                "made (a GradScaler "
                "skips those with infinities), so nothing was trained or rewired",
                stacklevel=2,
            )
        if self.pools:
            self.steps = agree([pool.weight for pool in self.pools], self.steps)
        self.epochs += 1
        self._after_epoch(evaluate, last)
        self._tidy()
        self._attachment.begin_epoch()

    def finalize(self) -> nn.Module:
        """Take the method's hooks and followers off and return the model, ready for use or further
        training.

        Warns if there was training, and the method's schedule allowed no single update in it.
        """
        self._warn_of_no_update()
        self._attachment.detach()
        self._release(self.pools)
        return self.model

    def connections(self) -> dict[str, int]:
        """Connections of each weight, by name; of methods that store more, those that take part in
        the function.
        """
        return {pool.name: pool.weight.connections for pool in self.pools}

    def active_masks(self) -> dict[str, Tensor]:
        """Which connections take part in the function, for weights whose own values do not say it.

        Bool tensors by name of the weight: of the shape of a dense weight, of the pool's length
        (capacity,) for a sparse one. Of the weights that are not named, every active slot and
        every entry that is not 0 takes part.
        """
        return {}

    def active_units(self) -> dict[str, Tensor]:
        """Which output units take part in the function, of layers whose units have gates.

        Bool tensors (units,) by name of the layer. Of the layers that are not named, all units do.
        """
        return {}

    def stats(self) -> dict[str, Any]:
        """Counts since the start: real steps, updates of topology, connections dropped and grown
        per weight.
        """
        return {
            "steps": self.steps,
            "updates": self.updates,
            "dropped": dict(self._dropped),
            "grown": dict(self._grown),
        }

    @final
    def state_dict(self) -> dict[str, Any]:
        """All the method needs to go on as if never stopped; tensors, numbers, strings, dicts and
        lists only.
        """
        return {
            "method": type(self).__name__,
            "seed": self.seed,
            "settings": self._all_settings(),
            "steps": self.steps,
            "epochs": self.epochs,
            "updates": self.updates,
            "dropped": dict(self._dropped),
            "grown": dict(self._grown),
            "sorted": dict(self._sorted),
            "own": self._state(),
        }

    @final
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result; the model must be restored as well, before or after.

        Raises ValueError for the state of another method or of a model with other weights; nothing
        changes then.
        """
        if state.get("method") != type(self).__name__:
            raise ValueError(
                f"this is the state of {state.get('method')}, not of {type(self).__name__}"
            )
        if set(state["dropped"]) != set(self._dropped):
            raise ValueError(
                f"this is the state of a model with weights {', '.join(state['dropped'])}, "
                f"not {', '.join(self._dropped)}"
            )
        for name, mine in self._all_settings().items():
            theirs = state.get("settings", {}).get(name)
            if theirs != mine:
                raise ValueError(
                    f"this is the state of a method with {name}={theirs!r}, but this "
                    f"one has {mine!r}"
                )
        try:
            numbers = [int(state[name]) for name in ("seed", "steps", "epochs", "updates")]
            counts = [dict(state[name]) for name in ("dropped", "grown", "sorted")]
            self._load_state(state["own"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this state is incomplete or damaged: {error!r}") from None
        self.seed, self.steps, self.epochs, self.updates = numbers
        self._dropped, self._grown, self._sorted = counts
        if self.steps:
            self._attachment.resumed()
        self._release(self.pools)
        self._request_capture()

    # --- what methods override --------------------------------------------------------------------

    def _after_step(self, pools: list[Pool]) -> None:
        """Act on the pools whose optimizer has just stepped; ``self.steps`` counts this step
        already.
        """

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        """Act on the end of an epoch; ``self.epochs`` counts this epoch already."""

    def _schedule(self) -> str | None:
        """The settings by which an update was to be made, in words ("every=100 steps"): named where
        none was made.

        None where a run without an update is nothing to speak of.
        """
        return None

    def _wants_capture(self, step: int) -> bool:
        """Whether optimizer step ``step`` (from 1) shall be captured for `_after_step`, as
        `_prepare` says how.
        """
        return False

    def _prepare(self, pool: Pool) -> None:
        """Have recorded what `_after_step` needs of the next step (`Pool.recorder`): the layer's
        calls.
        """
        pool.watch()

    def _all_settings(self) -> dict[str, Any]:
        return {"moments": self.moments} | self._settings()

    def _settings(self) -> dict[str, Any]:
        """Hyper-parameters without which the saved state means something else; loading refuses
        other ones.
        """
        return {}

    def _state(self) -> dict[str, Any]:
        """The method's own state beyond the counters."""
        return {}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `_state`'s result; read all of it before changing anything."""

    def __deepcopy__(self, memo: object) -> Method:
        raise TypeError(_NO_COPY)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(_NO_COPY)

    # --- services ---------------------------------------------------------------------------------

    def _exchange(
        self, pool: Pool, slots: Tensor, rows: Tensor, cols: Tensor, values: Tensor | float = 0.0
    ) -> Tensor:
        """Drop ``slots`` and grow the connections (rows, cols) in their places; return the slots
        that grew.

        With more grown than dropped, empty slots are taken (the pool is enlarged if there are too
        few); with fewer, the last dropped slots are emptied.
        """
        weight, drops, grows = pool.weight, slots.numel(), rows.numel()
        if grows > drops:
            lacking = grows - drops
            if weight.capacity - weight.connections < lacking:
                room = max(weight.connections + lacking, weight.capacity + weight.capacity // 2)
                weight.resize(min(room, weight.size), [pool.optimizer])
            spare = (weight.rows < 0).nonzero().flatten()[:lacking]
            slots = torch.cat([slots, spare])
        elif grows < drops:
            nothing = rows.new_full((drops - grows,), -1)
            rows, cols = torch.cat([rows, nothing]), torch.cat([cols, nothing])
            if isinstance(values, Tensor):
                values = torch.cat([values, values.new_zeros(drops - grows)])
        weight.rewire(slots, rows, cols, values)
        self._dropped[pool.name] += drops
        self._grown[pool.name] += grows
        return slots[:grows]

    def _tidy(self) -> None:
        """Sort the slots of pools whose connections have all been replaced, on average: an event as
        any other.

        When depends on counts in `state_dict` alone, so a resumed run does it at the same step.
        """
        for pool in self.pools:
            new = self._grown[pool.name] - self._sorted[pool.name]
            if new >= pool.weight.connections >= self.sort_from:
                pool.weight.reorder()
                self._sorted[pool.name] = self._grown[pool.name]

    def _shrink(self, pool: Pool, slots: Tensor) -> None:
        """Drop ``slots`` and give their storage back, and that of all other empty ones."""
        if slots.numel():
            nothing = slots.new_empty(0)
            self._exchange(pool, slots, nothing, nothing)
            self._give_back(pool, pool.weight.capacity - pool.weight.connections)

    def _give_back(self, pool: Pool, slots: int) -> None:
        """Make the pool shorter by so many of its empty slots (under DDP, where that cannot be,
        they stay).
        """
        if pool.weight.shared_seed is None:
            pool.weight.resize(pool.weight.capacity - slots, [pool.optimizer])

    def _trained(self) -> list[Pool]:
        """The pools that are not frozen (``values.requires_grad``)."""
        return [pool for pool in self.pools if pool.weight.values.requires_grad]

    def _warn_of_no_update(self) -> None:
        """For `finalize`, before anything that it does itself; says it once."""
        if (
            not self._attachment.attached
            or self.updates
            or not self._attachment.trained
            or self._warned
        ):
            return
        schedule = self._schedule()
        if schedule is not None:
            self._warned = True
            calls = (
                ""
                if self.epochs or "epoch" not in schedule
                else (", and call end_epoch() after every epoch")
            )
            if self._attachment.take():  # of steps that nobody has asked about
                calls += ", and call step() after every optimizer.step()"
            warnings.warn(
                f"{type(self).__name__} made no update in its steps ({self.steps}) and epochs "
                f"({self.epochs}), because "
                f"its schedule allowed none ({schedule}): choose a schedule that fits the run, or "
                f"train longer{calls}",
                stacklevel=3,
            )

    def _check_attached(self) -> None:
        if not self._attachment.attached:
            raise RuntimeError(
                "this method is finished: it was finalized, or another was made "
                "for the same weights"
            )

    def _request_capture(self) -> None:
        if self._wants_capture(self.steps + 1):
            for pool in self._trained():
                if pool.recorder is None or not pool.recorder.current():
                    self._prepare(pool)
            if not self._records:
                self._records = True
                here = weakref.ref(self)
                self._attachment.before_step(lambda optimizer: _freeze(here, optimizer))

    def _release(self, pools: Iterable[Pool]) -> None:
        for pool in pools:
            if pool.recorder is not None:
                pool.unwatch()

    def _limits_kept(self) -> tuple[str, ...]:
        """The kinds of limits kept under this method's settings."""
        return self.keeps_limits

    def _refuse_limits(self) -> None:
        for pool in self.pools:
            kinds = pool.weight.limits.kinds if pool.weight.limits is not None else ()
            broken = [kind for kind in kinds if kind not in self._limits_kept()]
            if broken:
                raise ValueError(
                    f"{pool.name} is limited to {pool.weight.limits}, and {type(self).__name__} "
                    "with these settings "
                    f"does not keep a limit on {' and '.join(broken)}: `rewire methods NAME` says "
                    "what a method keeps"
                )

    def _refuse_full(self) -> None:
        if any(pool.weight.connections < pool.weight.size for pool in self.pools):
            return
        shown = [
            f"{pool.name} (K = {pool.weight.connections} of M = {pool.weight.size})"
            for pool in self.pools
        ]
        if len(shown) > _NAMED:
            shown[_NAMED:] = [f"{len(shown) - _NAMED} others"]
        raise ValueError(
            f"{type(self).__name__} has nothing to rewire, because every weight has all of its "
            "connections: "
            f"{', '.join(shown)}; give one of them fewer than M at least (density= or "
            "connections=), or use Static"
        )

    def _refuse_weight_decay(self) -> None:
        for pool in self.pools:
            if float(pool.group.get("weight_decay", 0)) != 0:
                raise ValueError(
                    f"{type(self).__name__} must not be combined with weight decay on sparse "
                    "values, and the "
                    f"optimizer decays {pool.name} by {pool.group['weight_decay']}: make it with "
                    "rewire.param_groups(model, weight_decay, decay_sparse=False), or without "
                    "weight decay"
                )


def _freeze(method: weakref.ref[Method], optimizer: Optimizer) -> None:
    """The gradients are what ``optimizer`` will use: what was recorded of them is kept as it is
    now.
    """
    here = method()
    if here is not None:
        for pool in here.pools:
            if pool.recorder is not None and pool.optimizer is optimizer:
                pool.recorder.freeze(gradient_scale(optimizer))

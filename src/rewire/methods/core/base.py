"""The protocol every method follows, and the services that all of them share."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.distributed import agree, refuse_unprepared
from rewire.methods.core.attachment import Attachment, trained_weights
from rewire.methods.core.changes import Changes
from rewire.methods.core.parameters import Declared, current, service
from rewire.methods.core.pool import Pool, Purpose, gradient_scale
from rewire.methods.core.refusals import (
    agreed_seed,
    refuse_full,
    refuse_limits,
    refuse_model,
    refuse_prior,
    refuse_weight_decay,
)
from rewire.methods.core.runs import Run
from rewire.methods.core.saving import Saving
from rewire.methods.core.state import copied
from rewire.nn import Event, Moments

__all__ = ["Attachment", "Data", "Evaluate", "Memory", "Method", "Moments", "Pool", "Purpose"]

Memory = Literal["O(K)", "O(M)"]

#: Optional argument of `Method.end_epoch`: model -> score.
Evaluate = Callable[[nn.Module], float]

#: Training data for methods that look at activations (parameter ``data`` of their constructors): an
#: iterable that can be gone through again and again, of batches, each the input or a tuple or list
#: that begins with it.
Data = Iterable[Any]

_NO_COPY = (
    "a method is tied to its model and optimizer and cannot be copied or pickled: copy those, make "
    "a new method for them and give it this one's state_dict()"
)


class Method(Changes, Saving, Declared, ABC):
    """A way of finding connections while training; the interface of all methods.

    Call `penalty` in the loss, `step` after ``optimizer.step()`` (before a learning-rate
    scheduler's), `end_epoch` after each epoch, and `finalize` at the end.

    To write a method, override `_after_step` and, where needed, `_after_epoch`, `_wants_capture`.
    Declare hyper-parameters as fields (`rewire.methods.core.parameters`), and name in ``saves``
    the attributes that a saved state must hold; everything else is the same for all methods.

    A method that moves connections at a fixed budget (`needs_room`) raises ValueError where none of
    its weights has a dormant position. A full one beside others, as ERK makes of small layers, is
    fine: it keeps its connections.

    Args of every method:
        model: with at least one sparse weight.
        optimizer: the one (or several) that trains every pool, made before.
        seed: of the method's own random numbers; by default the seed that the ranks agreed on
            (`rewire.distributed.prepare`), else drawn from torch's default generator.
    """

    model: nn.Module = field(kw_only=False)
    optimizer: Optimizer | Iterable[Optimizer] = field(kw_only=False)
    seed: int = service(default=None, help="of the method's random numbers")
    weights_named: frozenset[str] | None = service(
        default=None, help="names of the weights to act on, for one of several methods in a Group"
    )

    #: How K is kept, and whether the method needs dense state: what the registry says of it, see
    #: `rewire.methods.MethodInfo`.
    keeps_budget: ClassVar[str] = "every step"
    memory: ClassVar[Memory] = "O(K)"
    #: Set where a paper forbids decay of sparse values: an optimizer that has it is refused.
    forbids_weight_decay: ClassVar[bool] = False
    #: Set by methods that start from an ordinary dense model and need no sparse weights in it.
    starts_dense: ClassVar[bool] = False
    #: Set by methods that end with fewer connections than they start with
    #: (`rewire.methods.pruning.shrink`): the density to build the pools with, 1 for all potential
    #: connections. None: the pools are built at their budget.
    start_density: ClassVar[float | None] = None
    #: Whether ranks of DDP that train the same values come to the same decisions.
    acts_in_ranks: ClassVar[bool] = True
    #: The kinds of limits (`rewire.budget.Limits`) that the method keeps; others are refused.
    keeps_limits: ClassVar[tuple[str, ...]] = ()
    #: Whether it keeps allowed positions and frozen connections (`rewire.topology.Prior`).
    keeps_prior: ClassVar[bool] = False
    #: Set by methods that move connections at a fixed budget: refused where no weight has a
    #: dormant position.
    needs_room: ClassVar[bool] = False
    #: The optimizer of `rewire train` where the user names none, and its rate; None for the usual
    #: one of the optimizer.
    run_optimizer: ClassVar[str] = "adam"
    run_lr: ClassVar[float | None] = None

    #: What grown connections start from in the optimizer; see `rewire.nn.follow_optimizer`.
    moments: str = field(init=False, default="auto")

    @classmethod
    def run_options(cls, run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
        """Hyper-parameters that `rewire train` sets where the user, who gave ``given``, did not.

        For what has no good value that is independent of the length of the ``run`` and of its
        optimizer.
        """
        return {}

    def __post_init__(self) -> None:
        self.check_parameters()
        refuse_model(self.model, type(self).__name__, dense=self.starts_dense)
        self._check()
        refuse_unprepared(
            self.model,
            trained_weights(self.model, self.optimizer),
            type(self).__name__,
            in_ranks=self.acts_in_ranks,
        )
        self._attachment = Attachment(
            self.model,
            self.optimizer,
            dense=self.starts_dense,
            moments=cast(Moments, "cleared" if self.moments == "dense" else self.moments),
            names=self.weights_named,
        )
        self.optimizers = self._attachment.optimizers
        self.pools = self._attachment.pools
        self.seed = agreed_seed(self.seed, [pool.weight for pool in self.pools])
        self.steps = self.epochs = self.updates = 0
        self._warned = False
        self._dropped = {pool.name: 0 for pool in self.pools}
        self._grown = {pool.name: 0 for pool in self.pools}
        self._sorted = dict(self._grown)  # how many had grown when the slots were last sorted
        self._records = False  # whether a step was ever asked for
        refuse_limits(self.pools, self._limits_kept(), type(self).__name__)
        refuse_prior(self.pools, self._prior_kept(), type(self).__name__)
        if self.needs_room:
            refuse_full(self.pools, type(self).__name__)
        if self.forbids_weight_decay:
            refuse_weight_decay(self.pools, type(self).__name__)
        self._setup()
        self._request_capture()

    def _check(self) -> None:
        """Check what concerns several hyper-parameters, and fill in those that follow from others,
        before anything is touched.
        """

    def _setup(self) -> None:
        """Make the method's own state; pools and optimizers are known by now."""

    # --- what users call --------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """The method's own term of the loss (a scalar); 0 for methods that act in `step`."""
        return torch.zeros((), device=self.optimizers[0].param_groups[0]["params"][0].device)

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
                "made (a GradScaler skips those with infinities), so nothing was trained",
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

    def count_connections(self) -> dict[str, int]:
        """Connections that take part in the function, by name of the weight."""
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
        """Counts since the start: steps, updates, connections dropped and grown per weight."""
        return {
            "steps": self.steps,
            "updates": self.updates,
            "dropped": dict(self._dropped),
            "grown": dict(self._grown),
        }

    # --- what methods override --------------------------------------------------------------------

    def _after_step(self, pools: list[Pool]) -> None:
        """Act on the pools that have just been stepped; ``self.steps`` counts this step already."""

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        """Act on the end of an epoch; ``self.epochs`` counts this epoch already."""

    def _schedule(self) -> str | None:
        """When updates are made, in words ("every=100 steps"), for the warning that there was none;
        None where a run without an update is nothing to speak of.
        """
        return None

    def _wants_capture(self, step: int) -> bool:
        """Whether `_prepare` shall have optimizer step ``step`` (from 1) recorded."""
        return False

    def _prepare(self, pool: Pool) -> None:
        """Have recorded what `_after_step` needs of the next step (`Pool.recorder`): the layer's
        calls.
        """
        pool.watch()

    def _settings(self) -> dict[str, Any]:
        """What a saved state must agree with: the parameters declared so, as they are in use."""
        names = [found.name for found in self.declared().values() if found.declared.saved]
        return {"moments": self.moments} | {name: copied(getattr(self, name)) for name in names}

    def _resumed(self) -> None:
        """After a state was restored."""
        if self.steps:
            self._attachment.resumed()
        self._release(self.pools)
        self._request_capture()

    def __deepcopy__(self, memo: object) -> Method:
        raise TypeError(_NO_COPY)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(_NO_COPY)

    # --- services ---------------------------------------------------------------------------------

    def _before_step(self, hook: Callable[[Any, Optimizer], None]) -> None:
        """Have ``hook(method, optimizer)`` called before each step, see `Attachment.before_step`.

        ``hook`` must not refer to the method in another way: nothing shall keep it alive.
        """
        here = weakref.ref(self)

        def before(optimizer: Optimizer) -> None:
            method = here()
            if method is not None:
                hook(method, optimizer)

        self._attachment.before_step(before)

    def _skip_steps(self, when: Callable[[Any], bool]) -> None:
        """Let steps move nothing where ``when(method)`` holds before; as for `_before_step`."""
        here = weakref.ref(self)
        self._attachment.skip_steps(lambda: (method := here()) is not None and when(method))

    def _follow(self, pool: Pool, follower: Callable[[Any, Pool, Event], None]) -> None:
        """Have ``follower(method, pool, event)`` called after each change of the pool; it must not
        refer to the method or the pool itself, as for `_before_step`.
        """
        here, number = weakref.ref(self), pool.number

        def follow(event: Event) -> None:
            method = here()
            if method is not None:
                follower(method, method.pools[number], event)

        self._attachment.follow(pool, follow)

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
                f"({self.epochs}), because its schedule allowed none ({schedule}): choose a "
                f"schedule that fits the run, or train longer{calls}",
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
                self._before_step(_freeze)

    def _release(self, pools: Iterable[Pool]) -> None:
        for pool in pools:
            if pool.recorder is not None:
                pool.unwatch()

    def _limits_kept(self) -> tuple[str, ...]:
        """The kinds of limits kept under this method's settings."""
        return self.keeps_limits

    def _prior_kept(self) -> tuple[str, ...]:
        return ("allowed", "frozen") if self.keeps_prior else ()

    def _now(self, name: str, step: int) -> float:
        """The number that hyper-parameter ``name`` has at ``step``, checked against its bounds."""
        return current(name, getattr(self, name), step, self.declared()[name].declared)


def _freeze(method: Method, optimizer: Optimizer) -> None:
    """The gradients are what ``optimizer`` will use: keep what was recorded of them."""
    for pool in method.pools:
        if pool.recorder is not None and pool.optimizer is optimizer:
            pool.recorder.freeze(gradient_scale(optimizer))

"""How a method holds on to what it works on: pools, optimizers, and the hooks that tie them
together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.methods.core.layer_hooks import release
from rewire.methods.core.pool import Pool
from rewire.methods.core.watch import Watch
from rewire.nn import Follower, Moments, SparseWeight, follow_optimizer, sparse_weights
from rewire.nn.optimizers.membership import homes_of, only_home
from rewire.nn.optimizers.wrappers import is_plain, listed, movers, trainers

__all__ = ["Attachment", "trained_weights"]

#: The attachment of the method that last took a model, for models without pools (a pool keeps its
#: own claim).
_CLAIMS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()


def trained_weights(
    model: nn.Module, optimizers: Optimizer | Iterable[Optimizer]
) -> list[tuple[str, SparseWeight]]:
    """The sparse weights that a method for these optimizers has to do with, by name.

    A frozen one that no optimizer has is none of them; a trainable one that was forgotten is.
    """
    known = {id(p) for o in listed(optimizers) for group in o.param_groups for p in group["params"]}
    return [
        (name, w)
        for name, w in sparse_weights(model)
        if w.values.requires_grad or id(w.values) in known
    ]


class Attachment:
    """The tie between a method and the optimizers: checks, followers, counting real steps, learning
    rates.

    An optimizer may have others inside (`rewire.nn.optimizers.wrappers`): the state of all of them
    follows, and a step is one of the innermost that has the pool.

    Raises ValueError at construction if a pool is in no optimizer or in two groups (the usual
    cause: `sparsify` after the optimizer was made), or the optimizer cannot train pools
    (`rewire.nn.optimizers.followers.check_optimizer`) or keeps what cannot follow
    (`rewire.nn.optimizers.wrappers.refuse_unknown`). ``dense`` is for methods that start from a
    dense model: then there need not be any pools. ``moments``: see `rewire.nn.follow_optimizer`.
    ``names``: of the weights to attach to, None for all; the others are left to other methods.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Iterable[Optimizer],
        *,
        dense: bool = False,
        moments: Moments = "auto",
        names: Set[str] | None = None,
    ) -> None:
        self.optimizers = listed(optimizers)
        self._model = weakref.ref(model)
        weights = trained_weights(model, self.optimizers)
        numbers = {name: number for number, (name, _) in enumerate(weights)}
        self._alone = names is None
        if names is not None:
            weights = [(name, w) for name, w in weights if name in names]
        if not weights and not dense:
            raise ValueError(
                "the model has no sparse weights: build it of rewire.nn layers or call "
                "rewire.sparsify first"
            )
        self.pools = [
            self._pool(i, name, weight, numbers[name]) for i, (name, weight) in enumerate(weights)
        ]
        self._handles: list[Any] = []
        self.attached = True
        for optimizer in self.optimizers:
            self._handles += follow_optimizer(
                optimizer, (p.weight for p in self.pools), moments=moments
            )
        self._readers: list[Callable[[Optimizer], None]] = []
        self._skips: list[Callable[[], bool]] = []
        #: Gradients taken away for the time of a step, by optimizer (``id``) and parameter.
        self._hidden: dict[int, dict[int, tuple[Tensor, Tensor | None]]] = {}
        # pools that had a gradient before the step, by optimizer
        self._part: dict[int, set[int]] = {}
        self._void: set[int] = set()  # optimizers in a step that a GradScaler has it skip
        self._movers: dict[int, list[Pool]] = {}  # what the steps of an optimizer (``id``) move
        self._fresh: set[int] = set()
        self._seen: set[int] = set()  # pools that took part in a step of this epoch
        self._away = False  # whether a pool is no longer in its optimizer's groups
        self._moved = False
        #: Whether an optimizer has stepped in this epoch.
        self.seen = False
        self._hook()
        self._counts = self._counted()
        for pool in self.pools:
            earlier = pool.weight.claim(self)
            if isinstance(earlier, Attachment):
                earlier.detach()
        # The hooks keep no strong reference to self: an abandoned method must not live as long as
        # its optimizer.
        here = weakref.ref(self)
        self._watch = Watch(lambda: _watched(here))
        for pool in self.pools:
            self.follow(pool, lambda event: _loaded(here) if event.loaded else None)
        if dense:
            claim = _CLAIMS.get(model)
            before = claim() if claim is not None else None
            if before is not None:
                before.detach()
            release(model)
            _CLAIMS[model] = here

    def _pool(self, number: int, name: str, weight: SparseWeight, place: int) -> Pool:
        home = only_home(
            f"{name}.values",
            homes_of(weight.values, self.optimizers),
            "after rewire.sparsify or loading, from model.parameters(),",
        )
        mover = movers(home.optimizer, weight.values)[0]
        _, group, index = homes_of(weight.values, [mover])[0]
        return Pool(number, name, weight, mover, group, place, index)

    def _hook(self) -> None:
        """Put hooks on all optimizers whose steps move parameters; again later, for those made
        since.
        """
        here = weakref.ref(self)

        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            attachment = here()
            return None if attachment is None else attachment._before(optimizer, args, kwargs)

        def stepped(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            attachment = here()
            if attachment is not None:
                attachment._stepped(optimizer)

        for optimizer in self.optimizers:
            for member in trainers(optimizer):
                # A wrapper that does not call Optimizer.__init__ has no hooks; if it moves weights,
                # the watch finds it.
                if id(member) not in self._movers and hasattr(member, "_optimizer_step_pre_hooks"):
                    self._handles.append(member.register_step_pre_hook(before))
                    self._handles.append(member.register_step_post_hook(stepped))
                self._movers[id(member)] = [
                    p for p in self.pools if member in movers(optimizer, p.weight.values)
                ]

    def parameters(self, optimizer: Optimizer) -> list[Tensor]:
        """What a method that acts on all parameters of ``optimizer`` may touch: of one in a group,
        its own pools.
        """
        own = {id(pool.weight.values) for pool in self.pools}
        return [
            p
            for group in optimizer.param_groups
            for p in group["params"]
            if self._alone or id(p) in own
        ]

    # --- before a step ----------------------------------------------------------------------------

    def before_step(self, hook: Callable[[Optimizer], None]) -> None:
        """Call ``hook`` before each step with the optimizer that makes it, until `detach`;
        gradients are then what the step will use, times `gradient_scale`.

        That optimizer is ``pool.optimizer`` of the pools it moves (the innermost, where optimizers
        wrap others). With a closure the hook is called after each time that the closure has been:
        of several calls before `Method.step`, the last one counts. It is called under
        `torch.no_grad`, and not for a step that a GradScaler has a fused optimizer skip. Let it
        hold its method weakly, as our own hook does.
        """
        self._readers.append(hook)

    def skip_steps(self, when: Callable[[], bool]) -> None:
        """Before an optimizer step with ``when()``, take the gradients away: it then moves neither
        values nor optimizer state of any parameter (in a group of methods: of any pool of this
        one). They are back when the step is done, and it counts as one.

        ``when`` shall hold its method weakly. What `before_step` asked for is done before.
        """
        self._skips.append(when)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = id(optimizer)
        # A step that calls its base class's is hooked twice, one within the other, as soon as
        # somebody has made an optimizer of the base class: what the outer hook took away is looked
        # at again.
        self._restore(key)
        self._void.discard(key)
        # a GradScaler leaves skipping to fused optimizers
        inf = optimizer.__dict__.get("found_inf")
        if inf is not None and float(inf) > 0:
            self._void.add(key)
            return None
        plain = is_plain(optimizer)
        if plain and not self._readers and not self._skips:
            return None
        place = next((i for i, a in enumerate(args) if i and callable(a)), None)
        closure = kwargs.get("closure") if place is None else args[place]
        if not callable(closure):
            self._ready(optimizer, plain)
            return None

        def evaluated() -> Any:
            self._restore(key)
            loss = closure()
            self._ready(optimizer, plain)
            return loss

        if place is None:
            return args, kwargs | {"closure": evaluated}
        return (*args[:place], evaluated, *args[place + 1 :]), kwargs

    @torch.no_grad()
    def _ready(self, optimizer: Optimizer, plain: bool) -> None:
        """The gradients are what the step will use."""
        for reader in self._readers:
            reader(optimizer)
        if not plain:  # it may clear gradients within its step
            self._part[id(optimizer)] = {p.number for p in self._own(optimizer) if _has_gradient(p)}
        if any(when() for when in self._skips):
            hidden = self._hidden.setdefault(id(optimizer), {})
            # What optimizers inside it step, they look at and hide themselves, in its step.
            inner = {id(p) for one in trainers(optimizer)[1:] for p in self.parameters(one)}
            for parameter in self.parameters(optimizer):
                if id(parameter) not in inner:
                    hidden[id(parameter)] = parameter, parameter.grad
                    parameter.grad = None

    def _restore(self, key: int) -> None:
        for parameter, gradient in self._hidden.pop(key, {}).values():
            # else the step has ended in an error, and this gradient is newer
            if parameter.grad is None:
                parameter.grad = gradient

    def _own(self, optimizer: Optimizer) -> list[Pool]:
        """The pools that a step of ``optimizer`` moves. Where several have the same pools, it takes
        them over.
        """
        pools = self._movers.get(id(optimizer), [])
        for pool in pools:
            if pool.optimizer is not optimizer:
                pool.optimizer = optimizer
                pool.at_home()
        return pools

    # --- after a step -----------------------------------------------------------------------------

    def _stepped(self, optimizer: Optimizer) -> None:
        key = id(optimizer)
        if self._hidden:
            self._restore(key)
        if self._void and key in self._void:
            self._void.discard(key)
            return
        part = self._part.pop(key, ()) if self._part else ()
        self.seen = self._moved = True
        self._watch.stepped()
        for pool in self._own(optimizer):
            # Frozen values, and those that got no gradient, have not been moved: they took no part
            # in this step.
            number = pool.number
            if number in part or _has_gradient(pool):
                self._fresh.add(number)
                self._seen.add(number)
                if pool.at_home():
                    pool.lr = float(pool.group["lr"])
                else:
                    self._away = True

    def take(self) -> list[Pool]:
        """The pools that optimizers have really moved since the last call (a GradScaler may skip a
        step).
        """
        fresh, self._fresh = self._fresh, set()
        return [pool for pool in self.pools if pool.number in fresh]

    def moved(self) -> bool:
        """Whether any optimizer has really stepped since the last call."""
        moved, self._moved = self._moved, False
        return moved

    # --- what must not happen silently ------------------------------------------------------------

    def look(self) -> None:
        """RuntimeError if a pool has left the optimizers, or one has come in that the method does
        not know.
        """
        counts = self._counted()
        if counts == self._counts and not self._away:
            return
        self._hook()
        for pool in self.pools:
            if not pool.at_home():
                raise RuntimeError(
                    f"{pool.name}.values is in no parameter group of the method's optimizer any "
                    "more, so nothing would train it: put it back, or freeze it with "
                    "requires_grad_(False) instead of taking it out"
                )
        self._refuse_strangers(
            {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]}
        )
        self._counts = counts

    def _counted(self) -> list[int]:
        return [len(group["params"]) for o in self.optimizers for group in o.param_groups]

    def _refuse_strangers(self, trained: set[int]) -> None:
        """RuntimeError if one of the parameters ``trained`` (by ``id``) is a pool of the model that
        no method has.
        """
        model = self._model()
        if model is None:
            return
        own = {id(pool.weight) for pool in self.pools}
        for name, weight in sparse_weights(model):
            if id(weight) in own or id(weight.values) not in trained:
                continue
            owner = weight.owner()
            if not isinstance(owner, Attachment) or not owner.attached:
                raise RuntimeError(
                    f"{name}.values is trained now, but the method was made when it was not, and "
                    "does not know it: give the optimizer all parameters from the start and freeze "
                    "layers with requires_grad_(False), or finalize() the method and make a new "
                    "one after add_param_group()"
                )

    def idle(self) -> None:
        """`Method.step` was called without an optimizer's step before it: a skipped one, or one
        that is not seen.
        """
        self._hook()
        self._watch.nothing_stepped()

    def missed(self, fresh: list[Pool]) -> None:
        """RuntimeError if pools that take no part in steps, all but ``fresh``, are trained
        nevertheless.
        """
        self._watch.missed({pool.number for pool in fresh})

    def acted(self) -> None:
        """After `missed`: the method has acted on the step."""
        self._watch.acted()

    def end_epoch(self) -> int:
        """RuntimeError if weights are trained that the method sees no steps of.

        Returns how many steps were asked for, if all of them were skipped; else 0.
        """
        seen = self._seen
        if not self.pools and self.seen:
            seen = set(range(len(_parameters(self))))
        skipped = self._watch.end_epoch(seen)
        model = self._model()
        if model is not None:
            pools = [w.values for _, w in sparse_weights(model)]
            self._refuse_strangers({id(v) for v in pools if v.requires_grad and v.grad is not None})
        return self._watch.idle if skipped else 0

    def begin_epoch(self) -> None:
        """What is compared at the end of an epoch, starts anew."""
        self._seen.clear()
        self.seen = False
        self._watch.begin_epoch()

    @property
    def trained(self) -> bool:
        """Whether an optimizer has ever stepped, here or in the run that this one resumes."""
        return self._watch.ever

    def resumed(self) -> None:
        """The method goes on where another has stopped: that its optimizer steps has been seen."""
        self._watch.loaded(resumed=True)

    # ----------------------------------------------------------------------------------------------

    def follow(self, pool: Pool, follower: Follower) -> None:
        """Tell ``follower`` of the pool's changes until `detach`."""
        self._handles.append(pool.weight.follow(follower))

    def hold(self, *handles: Any) -> None:
        """Remove these handles too at `detach`."""
        self._handles += handles

    def detach(self) -> None:
        """Remove hooks and followers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for pool in self.pools:
            pool.unwatch()
        self.attached = False


def _has_gradient(pool: Pool) -> bool:
    values = pool.weight._parameters["values"]
    return values is not None and values.requires_grad and values.grad is not None


def _parameters(attachment: Attachment) -> list[Tensor]:
    return [p for o in attachment.optimizers for group in o.param_groups for p in group["params"]]


def _watched(attachment: weakref.ref[Attachment]) -> list[tuple[str, Tensor, tuple[int, ...]]]:
    """What the watch looks at: pools, or all parameters of a method that has none."""
    here = attachment()
    if here is None:
        return []
    if here.pools:
        weights = [(pool.name, pool.weight) for pool in here.pools]
        return [(f"{name}.values", w.values, (id(w.rows), w.rows._version)) for name, w in weights]
    return [
        (f"parameter {i} of shape {tuple(p.shape)}", p, ()) for i, p in enumerate(_parameters(here))
    ]


def _loaded(attachment: weakref.ref[Attachment]) -> None:
    here = attachment()
    if here is not None:
        here._watch.loaded()

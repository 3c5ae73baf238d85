"""The protocol every method follows, and the services that all of them share."""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire import random
from rewire.nn import Follower, SparseWeight, follow_optimizer, sparse_weights

__all__ = ["Attachment", "Data", "Evaluate", "Method", "Pool", "Purpose", "only"]

#: Optional argument of `Method.end_epoch`: model -> score.
Evaluate = Callable[[nn.Module], float]

#: Training data for methods that look at activations (parameter ``data`` of their constructors): an iterable that can
#: be gone through again and again, of batches, each the input or a tuple or list that begins with it.
Data = Iterable[Any]

#: The attachment of the method that last took a model, for models without pools (a pool keeps its own claim).
_CLAIMS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()


#: Weights that an error names; the others it counts.
_NAMED = 5

#: Names of the weights that a method made now may have; None for all.
_ONLY: contextvars.ContextVar[frozenset[str] | None] = contextvars.ContextVar("only", default=None)


@contextlib.contextmanager
def only(names: Iterable[str]) -> Iterator[None]:
    """Within it, methods are made for the weights called ``names`` alone; the others are left to other methods."""
    token = _ONLY.set(frozenset(names))
    try:
        yield
    finally:
        _ONLY.reset(token)


class Purpose:
    """What random numbers are for. Each (pool, purpose) has a stream of its own, so none are ever used twice."""

    CANDIDATES, NOISE, GROW, SIGN, REDRAW, VALUE, TIES, ALLOT = range(8)
    COUNT: ClassVar[int] = 8


class Pool:
    """A sparse weight as a method sees it: with its name, number in the model, optimizer and parameter group."""

    def __init__(
        self,
        number: int,
        name: str,
        weight: SparseWeight,
        optimizer: Optimizer,
        group_number: int,
        place: int | None = None,
    ) -> None:
        self.number = number
        self._place = number if place is None else place  # among all pools of the model, other methods' too
        self.name = name
        self.weight = weight
        self.optimizer = optimizer
        self._group_number = group_number
        #: Learning rate that the last optimizer step used, even where a scheduler has changed it since.
        self.lr = float(self.group["lr"])

    @property
    def group(self) -> dict[str, Any]:
        """The optimizer's parameter group; looked up, because ``optimizer.load_state_dict`` makes new ones."""
        return self.optimizer.param_groups[self._group_number]

    def stream(self, purpose: int) -> int:
        """The random stream of this pool for ``purpose``."""
        return (self._place + 1) * Purpose.COUNT + purpose


class Attachment:
    """The tie between a method and the optimizers: checks, followers, counting real steps, learning rates.

    Raises ValueError at construction if a pool is in no optimizer or in two groups (the usual cause: `sparsify` after
    the optimizer was made), or the optimizer cannot train pools (`rewire.nn.followers.check_optimizer`). ``dense`` is
    for methods that start from a dense model: then there need not be any pools.
    """

    def __init__(self, model: nn.Module, optimizers: Optimizer | Iterable[Optimizer], *, dense: bool = False) -> None:
        self.optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        known = {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]}
        # A frozen pool that no optimizer has is none of ours; a trainable one that was forgotten is found below.
        weights = [(name, w) for name, w in sparse_weights(model) if w.values.requires_grad or id(w.values) in known]
        numbers = {name: number for number, (name, _) in enumerate(weights)}
        names = _ONLY.get()
        self._alone = names is None
        if names is not None:
            weights = [(name, w) for name, w in weights if name in names]
        if not weights and not dense:
            raise ValueError(
                "the model has no sparse weights: build it of rewire.nn layers or call rewire.sparsify first"
            )
        self.pools = [self._pool(i, name, weight, numbers[name]) for i, (name, weight) in enumerate(weights)]
        self._handles: list[Any] = []
        self.attached = True
        for optimizer in self.optimizers:
            self._handles += follow_optimizer(optimizer, (p.weight for p in self.pools))
        # The hook keeps no strong reference to self: an abandoned method must not live as long as its optimizer.
        here = weakref.ref(self)

        def stepped(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            attachment = here()
            if attachment is not None:
                attachment._stepped(optimizer)

        self._handles += [o.register_step_post_hook(stepped) for o in self.optimizers]
        self._fresh: set[int] = set()
        self._kept: list[tuple[Tensor, Tensor | None]] = []
        self._moved = False
        self.seen = False
        for pool in self.pools:
            earlier = pool.weight.claim(self)
            if isinstance(earlier, Attachment):
                earlier.detach()
        if dense:
            claim = _CLAIMS.get(model)
            before = claim() if claim is not None else None
            if before is not None:
                before.detach()
            _CLAIMS[model] = here

    def _pool(self, number: int, name: str, weight: SparseWeight, place: int) -> Pool:
        homes = [
            (optimizer, i)
            for optimizer in self.optimizers
            for i, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if parameter is weight.values
        ]
        if len(homes) != 1:
            where = "in no optimizer" if not homes else f"in the optimizer {len(homes)} times"
            raise ValueError(
                f"{name}.values is {where}, and must be there exactly once: make the optimizer after "
                "rewire.sparsify or loading, from model.parameters(), and pass all optimizers to the method"
            )
        return Pool(number, name, weight, *homes[0], place)

    def parameters(self, optimizer: Optimizer) -> list[Tensor]:
        """What a method that acts on all parameters of ``optimizer`` may touch: of one in a group, its own pools."""
        own = {id(pool.weight.values) for pool in self.pools}
        return [p for group in optimizer.param_groups for p in group["params"] if self._alone or id(p) in own]

    def skip_steps(self, when: Callable[[], bool]) -> None:
        """Before an optimizer step with ``when()``, take the gradients away: it then moves neither values nor optimizer
        state of any parameter (in a group of methods: of any pool of this one). They are back when the step is done,
        and it counts as one.

        ``when`` shall hold its method weakly.
        """
        here = weakref.ref(self)

        def hide(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            attachment = here()
            if attachment is not None and when():
                for parameter in attachment.parameters(optimizer):
                    attachment._kept.append((parameter, parameter.grad))
                    parameter.grad = None

        self._handles += [o.register_step_pre_hook(hide) for o in self.optimizers]

    def _stepped(self, optimizer: Optimizer) -> None:
        while self._kept:
            parameter, gradient = self._kept.pop()
            parameter.grad = gradient
        self.seen = self._moved = True
        for pool in self.pools:
            values = pool.weight.values
            # Frozen values, and those that got no gradient, have not been moved: they took no part in this step.
            if pool.optimizer is optimizer and values.requires_grad and values.grad is not None:
                self._fresh.add(pool.number)
                pool.lr = float(pool.group["lr"])

    def take(self) -> list[Pool]:
        """The pools that optimizers have really moved since the last call (a GradScaler may skip a step)."""
        fresh, self._fresh = self._fresh, set()
        return [pool for pool in self.pools if pool.number in fresh]

    def moved(self) -> bool:
        """Whether any optimizer has really stepped since the last call."""
        moved, self._moved = self._moved, False
        return moved

    def follow(self, pool: Pool, follower: Follower) -> None:
        """Tell ``follower`` of the pool's changes until `detach`."""
        self._handles.append(pool.weight.follow(follower))

    def before_step(self, hook: Callable[[Optimizer], None]) -> None:
        """Call ``hook`` with the optimizer before each of its steps, while gradients are there, until `detach`.

        Let it hold its method weakly, as our own hook does.
        """
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(lambda o, args, kwargs: hook(o)))

    def hold(self, *handles: Any) -> None:
        """Remove these handles too at `detach`."""
        self._handles += handles

    def detach(self) -> None:
        """Remove hooks and followers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.attached = False


_NO_COPY = (
    "a method is tied to its model and optimizer and cannot be copied or pickled: copy those, make a new method for "
    "them and give it this one's state_dict()"
)


class Method(ABC):
    """A way of finding connections while training; the interface of all methods.

    Call `penalty` in the loss, `step` after ``optimizer.step()`` (before a learning-rate scheduler's), `end_epoch`
    after each epoch, and `finalize` at the end. A method is written by overriding `_after_step` and, where
    needed, `_after_epoch`, `_wants_capture`, `_state` and `_load_state`; everything else is the same for all of them.

    A method that moves connections at a fixed budget (`needs_room`) raises ValueError where none of its weights has a
    dormant position. A full one beside others, as ERK makes of small layers, is fine: it keeps its connections.

    Args of every method:
        model: with at least one sparse weight.
        optimizer: the one (or several) that trains every pool, made before.
        seed: of the method's own random numbers; by default the seed that the ranks agreed on
            (`rewire.distributed.prepare`), else drawn from torch's default generator.
    """

    #: Set where a paper forbids decay of sparse values; construction then refuses an optimizer that has it.
    forbids_weight_decay: ClassVar[bool] = False
    #: Slots of a pool of at least this many connections are sorted again once as many have grown as there are. Before,
    #: the whole pool lies in cache and their order costs nothing; sorted, a large layer's step is 5 to 15 % faster.
    sort_from: ClassVar[int] = 1 << 16
    #: Set by methods that start from an ordinary dense model and need no sparse weights in it.
    starts_dense: ClassVar[bool] = False
    #: Set by methods that end with fewer connections than they start with (`rewire.methods.shrink`): the density to
    #: build the pools with, 1 for all potential connections. None: the pools are built at their budget.
    start_density: ClassVar[float | None] = None
    #: The kinds of limits (`rewire.budget.Limits`) that the method keeps; others are refused at construction.
    keeps_limits: ClassVar[tuple[str, ...]] = ()

    #: Set by methods that move connections at a fixed budget: refused where no weight has a position to move one to.
    needs_room: ClassVar[bool] = False

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer], *, seed: int | None = None
    ) -> None:
        self.model = model
        self._attachment = Attachment(model, optimizer, dense=self.starts_dense)
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
        self._dropped = {pool.name: 0 for pool in self.pools}
        self._grown = {pool.name: 0 for pool in self.pools}
        self._sorted = dict(self._grown)  # how many had grown when the slots were last sorted
        self._refuse_limits()
        if self.needs_room:
            self._refuse_full()
        if self.forbids_weight_decay:
            self._refuse_weight_decay()
        self._request_capture()

    # --- what users call --------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """The method's own term of the loss (a scalar); 0 for methods that act in `step`."""
        return torch.zeros((), device=self.optimizers[0].param_groups[0]["params"][0].device)

    @final
    @torch.no_grad()
    def step(self) -> None:
        """Act on the optimizer step just made; after a step that was skipped (GradScaler) this does nothing."""
        self._check_attached()
        pools = self._attachment.take()
        if not (pools or (self.starts_dense and self._attachment.moved())):
            self._release(self.pools)  # what was captured belongs to no step
            self._request_capture()
            return
        self.steps += 1
        self._after_step(pools)
        self._tidy()
        self._release(pools)
        self._request_capture()

    @final
    @torch.no_grad()
    def end_epoch(self, evaluate: Evaluate | None = None, *, last: bool = False) -> None:
        """Act on the end of an epoch.

        ``evaluate`` (model -> score) is for methods that decide by it. ``last`` says that no training follows: methods
        whose paper does not rewire after the last epoch then leave the topology alone.
        """
        self._check_attached()
        if not self._attachment.seen:
            raise RuntimeError(
                "no step of the method's optimizer was seen before the end of the epoch: make the method with the "
                "optimizer that trains the model (a copy or a new optimizer needs a method of its own)"
            )
        self.epochs += 1
        self._after_epoch(evaluate, last)
        self._tidy()

    def finalize(self) -> nn.Module:
        """Take the method's hooks and followers off and return the model, ready for use or further training."""
        self._attachment.detach()
        self._release(self.pools)
        return self.model

    def connections(self) -> dict[str, int]:
        """Connections of each weight, by name; of methods that store more, those that take part in the function."""
        return {pool.name: pool.weight.connections for pool in self.pools}

    def stats(self) -> dict[str, Any]:
        """Counts since the start: real steps, updates of topology, connections dropped and grown per weight."""
        return {
            "steps": self.steps,
            "updates": self.updates,
            "dropped": dict(self._dropped),
            "grown": dict(self._grown),
        }

    @final
    def state_dict(self) -> dict[str, Any]:
        """All the method needs to go on as if never stopped; tensors, numbers, strings, dicts and lists only."""
        return {
            "method": type(self).__name__,
            "seed": self.seed,
            "settings": self._settings(),
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

        Raises ValueError for the state of another method or of a model with other weights; nothing changes then.
        """
        if state.get("method") != type(self).__name__:
            raise ValueError(f"this is the state of {state.get('method')}, not of {type(self).__name__}")
        if set(state["dropped"]) != set(self._dropped):
            raise ValueError(
                f"this is the state of a model with weights {', '.join(state['dropped'])}, "
                f"not {', '.join(self._dropped)}"
            )
        for name, mine in self._settings().items():
            theirs = state.get("settings", {}).get(name)
            if theirs != mine:
                raise ValueError(f"this is the state of a method with {name}={theirs!r}, but this one has {mine!r}")
        try:
            numbers = [int(state[name]) for name in ("seed", "steps", "epochs", "updates")]
            counts = [dict(state[name]) for name in ("dropped", "grown", "sorted")]
            self._load_state(state["own"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this state is incomplete or damaged: {error!r}") from None
        self.seed, self.steps, self.epochs, self.updates = numbers
        self._dropped, self._grown, self._sorted = counts
        self._release(self.pools)
        self._request_capture()

    # --- what methods override --------------------------------------------------------------------------------------

    def _after_step(self, pools: list[Pool]) -> None:
        """Act on the pools whose optimizer has just stepped; ``self.steps`` counts this step already."""

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        """Act on the end of an epoch; ``self.epochs`` counts this epoch already."""

    def _wants_capture(self, step: int) -> bool:
        """Whether optimizer step ``step`` (from 1) shall be captured for `_after_step`, as `_prepare` says how."""
        return False

    def _prepare(self, pool: Pool) -> None:
        """Ask the pool's layer to keep what `_after_step` needs of the next step: its calls (`rewire.ops.Pair`)."""
        pool.weight.capture = []

    def _settings(self) -> dict[str, Any]:
        """Hyper-parameters without which the saved state means something else; loading refuses other ones."""
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

    # --- services ---------------------------------------------------------------------------------------------------

    def _exchange(self, pool: Pool, slots: Tensor, rows: Tensor, cols: Tensor, values: Tensor | float = 0.0) -> Tensor:
        """Drop ``slots`` and grow the connections (rows, cols) in their places; return the slots that grew.

        With more grown than dropped, empty slots are taken (the pool is enlarged if there are too few); with fewer,
        the last dropped slots are emptied.
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
        """Sort the slots of pools whose connections have all been replaced, on average: an event as any other.

        When depends on counts in `state_dict` alone, so a resumed run does it at the same step.
        """
        for pool in self.pools:
            new = self._grown[pool.name] - self._sorted[pool.name]
            if new >= pool.weight.connections >= self.sort_from:
                pool.weight.reorder()
                self._sorted[pool.name] = self._grown[pool.name]

    def _shrink(self, pool: Pool, slots: Tensor) -> None:
        """Drop ``slots`` and give their storage back (under DDP, where that cannot be, they stay empty)."""
        if slots.numel():
            nothing = slots.new_empty(0)
            self._exchange(pool, slots, nothing, nothing)
            if pool.weight.shared_seed is None:
                pool.weight.resize(pool.weight.connections, [pool.optimizer])

    def _trained(self) -> list[Pool]:
        """The pools that are not frozen (``values.requires_grad``)."""
        return [pool for pool in self.pools if pool.weight.values.requires_grad]

    def _check_attached(self) -> None:
        if not self._attachment.attached:
            raise RuntimeError("this method is finished: it was finalized, or another was made for the same weights")

    def _request_capture(self) -> None:
        if self._wants_capture(self.steps + 1):
            for pool in self._trained():
                if pool.weight.capture is None and pool.weight.candidates is None:
                    self._prepare(pool)

    def _release(self, pools: Iterable[Pool]) -> None:
        for pool in pools:  # setting an attribute of a module takes longer than looking
            if pool.weight.capture is not None:
                pool.weight.capture = None
            if pool.weight.candidates is not None:
                pool.weight.candidates = None

    def _limits_kept(self) -> tuple[str, ...]:
        """The kinds of limits kept under this method's settings."""
        return self.keeps_limits

    def _refuse_limits(self) -> None:
        for pool in self.pools:
            kinds = pool.weight.limits.kinds if pool.weight.limits is not None else ()
            broken = [kind for kind in kinds if kind not in self._limits_kept()]
            if broken:
                raise ValueError(
                    f"{pool.name} is limited to {pool.weight.limits}, and {type(self).__name__} with these settings "
                    f"does not keep a limit on {' and '.join(broken)}: `rewire methods NAME` says what a method keeps"
                )

    def _refuse_full(self) -> None:
        if any(pool.weight.connections < pool.weight.size for pool in self.pools):
            return
        shown = [f"{pool.name} (K = {pool.weight.connections} of M = {pool.weight.size})" for pool in self.pools]
        if len(shown) > _NAMED:
            shown[_NAMED:] = [f"{len(shown) - _NAMED} others"]
        raise ValueError(
            f"{type(self).__name__} has nothing to rewire, because every weight has all of its connections: "
            f"{', '.join(shown)}; give one of them fewer than M at least (density= or connections=), or use Static"
        )

    def _refuse_weight_decay(self) -> None:
        for pool in self.pools:
            if float(pool.group.get("weight_decay", 0)) != 0:
                raise ValueError(
                    f"{type(self).__name__} must not be combined with weight decay on sparse values, and the "
                    f"optimizer decays {pool.name} by {pool.group['weight_decay']}: make it with "
                    "rewire.param_groups(model, weight_decay, decay_sparse=False), or without weight decay"
                )

"""How a method holds on to what it works on: pools, optimizers, and the hooks that tie them together."""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.nn import Follower, SparseWeight, follow_optimizer, sparse_weights

__all__ = ["Attachment", "Pool", "Purpose", "only"]

#: The attachment of the method that last took a model, for models without pools (a pool keeps its own claim).
_CLAIMS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()


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

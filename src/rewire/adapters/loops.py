"""What callbacks for the training loops of other libraries share: a model made sparse before its
optimizer, a method made after it, and the method's state in the loop's own checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

import rewire
from rewire import budget, methods
from rewire.distributed import several_ranks
from rewire.nn import sparse_weights
from rewire.nn.convert.counts import Patterns, chosen
from rewire.nn.convert.cut import dense_weights

__all__ = ["LoopCallback"]


class LoopCallback:
    """A method with a connection budget in somebody else's training loop.

    Args:
        method: a name that `rewire.methods.available` lists, a class of `rewire.methods`, or a
            function that makes a method of a model and its optimizers.
        density, connections, distribution, only, exclude: as in `rewire.sparsify`, which the
            callback calls before the optimizer is made. Without density and connections the model
            must have sparse layers already.
        parameters: hyper-parameters of the method, and its ``seed``.

    The callback tells the method the length of the training, if the method has a parameter for it.

    Raises ValueError for an unknown method, and for one that starts from a dense model, because it
    replaces layers while the loop holds on to them.
    """

    def __init__(
        self,
        method: str | Callable[..., methods.Method],
        *,
        density: float | None = None,
        connections: int | None = None,
        distribution: str = "erk",
        only: Patterns | None = None,
        exclude: Patterns | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__()
        self._make: Any = methods.info(method).cls if isinstance(method, str) else method
        self._name = method if isinstance(method, str) else ""
        if not callable(self._make):
            raise TypeError(f"method must be a name or a function, not {method!r}")
        if getattr(self._make, "starts_dense", False):
            raise ValueError(
                f"method={method!r} starts from a dense model and replaces its layers while it "
                "trains, which this loop would not follow: use rewire.methods in a loop of your own"
            )
        if density is not None and connections is not None:
            raise ValueError("give density= or connections=, not both")
        self._budget: dict[str, Any] = {"density": density, "connections": connections}
        self._distribution, self._only, self._exclude = distribution, only, exclude
        self._parameters = parameters
        self._arguments = {
            "method": method,
            **self._budget,
            "distribution": distribution,
            "only": only,
            "exclude": exclude,
            **parameters,
        }
        #: The method, from the beginning of the training on.
        self.method: methods.Method | None = None
        self._model: nn.Module | None = None  # that this callback made sparse
        self._possible = 0
        self._length: dict[str, int] = {}  # of the training, as the method was told
        self._ended = 0  # epochs whose end the method knows

    @property
    def makes_sparse(self) -> bool:
        """Whether it was given a budget for a dense model."""
        return any(value is not None for value in self._budget.values())

    # --- before the optimizer is made -------------------------------------------------------------

    def make_sparse(self, model: nn.Module) -> None:
        """Make ``model`` sparse, unless it is already, and prepare it for several ranks; a second
        call for the same model does nothing.
        """
        if model is self._model:
            return
        found = any(True for _ in sparse_weights(model))
        if not self.makes_sparse:
            if not found:
                raise ValueError("the model has no sparse layers: give density= or connections=")
        elif found:
            raise ValueError(
                "the model has sparse layers already: leave density= and connections= out"
            )
        else:
            self._sparsify(model)
        if several_ranks():
            rewire.distributed.prepare(model)
        self._model = model

    def _sparsify(self, model: nn.Module) -> None:
        shapes = {
            name: tuple(weight.shape)
            for name, layer, _, weight in dense_weights(model)
            if chosen(layer, self._only, self._exclude)
        }
        if not shapes:
            raise ValueError(
                "no layer to make sparse: the model has no layers of torch.nn with a weight, or "
                "only= and exclude= leave none of them"
            )
        sizes = sum(map(math.prod, shapes.values()))
        counts = budget.distribute(
            self._distribution, list(shapes.values()), budget.allowed(sizes, **self._budget)
        )
        if (start := getattr(self._make, "start_density", None)) is not None:
            self._parameters = {"connections": counts} | self._parameters
            counts = budget.starting(start, list(shapes.values()), counts)
        rewire.sparsify(model, connections=dict(zip(shapes, counts, strict=True)))

    # --- while it trains --------------------------------------------------------------------------

    def begin(
        self,
        model: nn.Module,
        optimizers: Optimizer | Iterable[Optimizer],
        length: Callable[[], Mapping[str, int]],
        epoch: int,
        saved: Mapping[str, Any] | None,
    ) -> None:
        """Make the method; with ``saved``, a result of `saved_state`, it goes on from there.

        ``length`` gives ``total_steps`` and ``total_epochs``, as far as they are known; a training
        that is resumed keeps those it began with. ``epoch``: how many have ended.
        """
        self._length = dict(saved["length"] if saved else length())
        known = self._make.declared() if hasattr(self._make, "declared") else {}
        given = {name: n for name, n in self._length.items() if name in known} | self._parameters
        self.method = (
            methods.create(self._name, model, optimizers, **given)
            if self._name
            else self._make(model, optimizers, **given)
        )
        if self.method.penalty().requires_grad:
            raise ValueError(
                f"{type(self.method).__name__} adds a term to the loss, which a callback cannot: "
                "use it in a loop of your own"
            )
        if saved:
            self.method.load_state_dict(saved["method"])
        self._ended = int(saved["ended"]) if saved else epoch
        self._possible = sum(math.prod(weight.shape) for _, weight in sparse_weights(model))

    def end_epochs(self, until: int, *, last: bool = False) -> None:
        """Tell the method that the epochs before ``until`` have ended, each of them once.

        A loop may save between the last step of an epoch and its end. A training that goes on from
        such a checkpoint begins with the next epoch.
        """
        assert self.method is not None
        while self._ended < until:
            self._ended += 1
            self.method.end_epoch(last=last and self._ended == until)

    def figures(self) -> dict[str, float]:
        """What is logged: connections, their density, and how many have grown since the start."""
        if self.method is None:
            return {}
        connections = sum(self.method.count_connections().values())
        grown = sum(self.method.stats()["grown"].values()) if self.method.pools else 0
        return {
            "connections": float(connections),
            "density": connections / self._possible,
            "grown": float(grown),
        }

    def as_json(self) -> dict[str, Any]:
        """The arguments of the constructor, if JSON can hold them; else nothing."""
        try:
            json.dumps(self._arguments)
        except TypeError:
            return {}
        return dict(self._arguments)

    def saved_state(self) -> dict[str, Any]:
        """All that a resumed training needs, except model, optimizer and random numbers."""
        assert self.method is not None
        return {
            "method": self.method.state_dict(),
            "length": dict(self._length),
            "ended": self._ended,
        }

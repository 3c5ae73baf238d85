"""How a method is saved and restored: its settings, its counters, and what it declares itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from rewire.methods.core.pool import Pool
from rewire.methods.core.state import restore, saved

__all__ = ["Saving"]


class Saving(ABC):
    """The part of `rewire.methods.Method` that has a ``state_dict``."""

    #: Attributes of this class that a saved state holds: numbers, words, tensors, and lists (by
    #: number of the pool) or dicts of them; ``"grow.averages"`` is the attribute of an attribute.
    #: Those of base classes are saved as well.
    saves: ClassVar[tuple[str, ...]] = ()

    seed: int
    steps: int
    epochs: int
    updates: int
    optimizers: list[Optimizer]
    pools: list[Pool]
    _dropped: dict[str, int]
    _grown: dict[str, int]
    _sorted: dict[str, int]

    def state_dict(self) -> dict[str, Any]:
        """All the method needs to go on as if never stopped; tensors, numbers, strings, dicts and
        lists only.
        """
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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result; the model must be restored as well, before or after.

        Raises ValueError for the state of another method or of a model with other weights; nothing
        changes then.
        """
        if state.get("method") != type(self).__name__:
            raise ValueError(
                f"this is the state of {state.get('method')}, not of {type(self).__name__}"
            )
        if set(state.get("dropped") or ()) != set(self._dropped):
            raise ValueError(
                f"this is the state of a model with weights {', '.join(state['dropped'])}, "
                f"not {', '.join(self._dropped)}"
            )
        for name, mine in self._settings().items():
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
        self._resumed()

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What a saved state must agree with."""

    @abstractmethod
    def _resumed(self) -> None:
        """Go on from the state that was just restored."""

    @classmethod
    def _saved(cls) -> list[str]:
        return [name for base in reversed(cls.__mro__) for name in vars(base).get("saves", ())]

    def _state(self) -> dict[str, Any]:
        """The method's own state beyond the counters: what ``saves`` names."""
        return saved(self, self._saved())

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `_state`'s result; read all of it before changing anything."""
        places = {key: p.weight.device for p in self.pools for key in (p.name, p.number)}
        elsewhere: torch.device = self.optimizers[0].param_groups[0]["params"][0].device
        restore(self, self._saved(), state, lambda key: places.get(key, elsewhere))

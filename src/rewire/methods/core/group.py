"""Several methods on several layers, as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.methods.core.attachment import trained_weights
from rewire.methods.core.base import Evaluate, Method
from rewire.methods.core.parameters import both_names, fits
from rewire.methods.core.refusals import agreed_seed
from rewire.nn.optimizers.wrappers import listed

__all__ = ["Group"]

#: Makes a method: its class, or `functools.partial` of it with hyper-parameters.
Factory = Callable[..., Method]
_V = TypeVar("_V")


class Group(Method):
    """Different methods for different layers, with the protocol of one (`Method`)::

        Group(model, optimizer, {"conv*": partial(RigL, fraction=0.2), "fc*": DeepR})

    Args:
        model, optimizer, seed: as of every method. The methods share the seed; no two draw the same
            numbers.
        methods: glob patterns over names, of a weight ("conv1.weight") or the layer that has it
            ("conv1"), to classes of methods, or functools.partial of one with hyper-parameters.
            Every trained sparse weight must match exactly one. What a method does to all parameters
            (RigL's skipped step), it does to its own weights here.

    Raises ValueError naming the weights that match no pattern or several, and patterns that match
    nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        methods: Mapping[str, Factory],
        *,
        seed: int | None = None,
    ) -> None:
        self.model = model
        self.optimizers = listed(optimizer)
        weights = trained_weights(model, self.optimizers)
        self.seed = agreed_seed(seed, [weight for _, weight in weights])
        chosen = _assign([name for name, _ in weights], list(methods))
        #: The methods, by pattern.
        self.methods: dict[str, Method] = {
            pattern: make(
                model, self.optimizers, seed=self.seed, weights_named=frozenset(chosen[pattern])
            )
            for pattern, make in methods.items()
        }
        self.pools = [pool for method in self.methods.values() for pool in method.pools]

    def __getitem__(self, pattern: str) -> Method:
        return self.methods[pattern]

    def penalty(self) -> Tensor:
        """The sum of the methods' terms of the loss."""
        return torch.stack([method.penalty() for method in self.methods.values()]).sum()

    def step(self) -> None:
        """Let each method act on the optimizer step just made."""
        for method in self.methods.values():
            method.step()

    def end_epoch(self, evaluate: Evaluate | None = None, *, last: bool = False) -> None:
        """Let each method act on the end of an epoch."""
        for method in self.methods.values():
            method.end_epoch(evaluate, last=last)

    def finalize(self) -> nn.Module:
        """Finalize each method and return the model."""
        for method in self.methods.values():
            self.model = method.finalize()
        return self.model

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Real optimizer steps: the most of any method."""
        return max(method.steps for method in self.methods.values())

    @property
    def epochs(self) -> int:  # type: ignore[override]
        """Epochs that have ended."""
        return max(method.epochs for method in self.methods.values())

    @property
    def updates(self) -> int:  # type: ignore[override]
        """Updates of the topology: the most of any method."""
        return max(method.updates for method in self.methods.values())

    def count_connections(self) -> dict[str, int]:
        """Connections of each weight, by name."""
        return self._together(lambda method: method.count_connections())

    def active_masks(self) -> dict[str, Tensor]:
        """Those of all methods."""
        return self._together(lambda method: method.active_masks())

    def active_units(self) -> dict[str, Tensor]:
        """Those of all methods."""
        return self._together(lambda method: method.active_units())

    def _together(self, of: Callable[[Method], dict[str, _V]]) -> dict[str, _V]:
        """What each method says of its own weights or layers, in one dict."""
        return {name: v for method in self.methods.values() for name, v in of(method).items()}

    def stats(self) -> dict[str, Any]:
        """Counts of all methods together: the most steps and updates, dropped and grown of every
        weight.
        """
        each = [method.stats() for method in self.methods.values()]
        merged: dict[str, Any] = {
            name: max(stats[name] for stats in each) for name in ("steps", "updates")
        }
        for name in ("dropped", "grown"):
            merged[name] = {weight: n for stats in each for weight, n in stats[name].items()}
        return merged

    def state_dict(self) -> dict[str, Any]:
        """The states of the methods, by pattern."""
        return {pattern: method.state_dict() for pattern, method in self.methods.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result; ValueError for the state of a group with other
        patterns.
        """
        if set(state) != set(self.methods):
            raise ValueError(
                f"this is the state of a group of {', '.join(state)}, not of "
                f"{', '.join(self.methods)}"
            )
        before = self.state_dict()
        try:
            for pattern, method in self.methods.items():
                method.load_state_dict(state[pattern])
        except ValueError:
            for pattern, method in self.methods.items():
                method.load_state_dict(before[pattern])
            raise
        self.seed = next(iter(self.methods.values())).seed


def _assign(names: list[str], patterns: list[str]) -> dict[str, list[str]]:
    chosen: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    none, several = [], []
    for name in names:
        found = [pattern for pattern in patterns if fits(both_names(name), pattern)]
        if len(found) == 1:
            chosen[found[0]].append(name)
        elif found:
            several.append(f"{name} ({' and '.join(found)})")
        else:
            none.append(name)
    if none:
        raise ValueError(
            f"no pattern matches {', '.join(none)}: add one for them (methods.Static leaves a "
            "topology as it is)"
        )
    if several:
        raise ValueError(
            f"more than one pattern matches {', '.join(several)}: make the patterns "
            "exclude each other"
        )
    idle = [pattern for pattern, matched in chosen.items() if not matched]
    if idle:
        raise ValueError(
            f"no trained sparse weight matches {', '.join(idle)}: there are "
            f"{', '.join(names) or 'none'}"
        )
    return chosen

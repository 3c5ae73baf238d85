"""The parameters that all estimators have, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from sklearn.base import BaseEstimator

from rewire import methods
from rewire.adapters.sklearn.network import ACTIVATIONS
from rewire.budget import DISTRIBUTIONS, Limits
from rewire.methods import MethodInfo
from rewire.schedules import RATES

__all__ = ["DENSITY", "OPTIMIZERS", "Settings", "is_whole"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
DENSITY = 0.1
#: With ``max_epochs="auto"``: passes over the data and optimizer steps, at least.
PASSES, STEPS = 20, 1000
#: Steps in an epoch of a method, at least.
EPOCH_STEPS = 10


def is_whole(value: object, least: int | None = None) -> bool:
    """Whether ``value`` is a whole number, of Python or NumPy, of at least ``least``."""
    return isinstance(value, Integral) and (least is None or int(value) >= least)


@dataclass(kw_only=True, eq=False, repr=False)
class Settings(BaseEstimator):  # type: ignore[misc]
    """What a user chooses for an estimator: a field each, so that it is declared once."""

    hidden_layer_sizes: Any = (100,)
    method: str = "set"
    method_params: Mapping[str, Any] | None = None
    density: float | None = None
    connections: int | None = None
    distribution: str = "erk"
    limits: Limits | None = None
    activation: str = "relu"
    solver: str = "auto"
    learning_rate_init: float | None = None
    learning_rate: str = "cosine"
    alpha: float = 0.0
    batch_size: int | str = "auto"
    max_epochs: int | str = "auto"
    shuffle: bool = True
    early_stopping: bool = False
    validation_fraction: float = 0.1
    n_iter_no_change: int = 10
    tol: float = 1e-4
    warm_start: bool = False
    n_jobs: int | None = None
    random_state: Any = None
    verbose: bool = False

    def _sizes(self) -> tuple[int, ...]:
        given = self.hidden_layer_sizes
        sizes = (given,) if is_whole(given) else tuple(given)
        if not all(is_whole(size, 1) for size in sizes):
            raise ValueError(
                f"hidden_layer_sizes must be positive whole numbers, not {self.hidden_layer_sizes}"
            )
        return tuple(map(int, sizes))

    def _check_parameters(self) -> None:
        """Raise ValueError for a parameter that nothing else checks."""
        self._sizes()
        choices = {
            "activation": ACTIVATIONS,
            "distribution": DISTRIBUTIONS,
            "learning_rate": ("constant", "cosine"),
            "solver": ("auto", *OPTIMIZERS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(sorted(allowed))}, "
                    f"not {getattr(self, name)!r}"
                )
        methods.info(self.method)
        if self.density is not None and self.connections is not None:
            raise ValueError("give density or connections, not both")
        if not is_whole(self.n_iter_no_change, 1):
            raise ValueError(
                "n_iter_no_change must be a whole number of at least 1, "
                f"not {self.n_iter_no_change!r}"
            )
        for name in ("batch_size", "max_epochs"):
            value = getattr(self, name)
            if value != "auto" and not is_whole(value, 1):
                raise ValueError(
                    f"{name} must be 'auto' or a whole number of at least 1, not {value!r}"
                )
        if self.early_stopping and not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must lie between 0 and 1, not {self.validation_fraction}"
            )
        if self.n_jobs is not None and (not is_whole(self.n_jobs) or self.n_jobs == 0):
            raise ValueError(f"n_jobs must be None or a whole number but 0, not {self.n_jobs!r}")

    def _batch(self, samples: int) -> int:
        return min(200, samples) if self.batch_size == "auto" else int(self.batch_size)

    def _plan(self, samples: int) -> tuple[int, int, int]:
        """Samples of a step, passes over the data, and passes that make an epoch of the method.

        Methods know published intervals in epochs. A pass over few samples is too short for one.
        """
        batch = self._batch(samples)
        steps = -(-samples // batch)
        passes = max(PASSES, -(-STEPS // steps)) if self.max_epochs == "auto" else self.max_epochs
        return batch, int(passes), -(-EPOCH_STEPS // steps)

    def _solver(self) -> tuple[str, float]:
        """The optimizer and its first rate; by default those that suit the method."""
        cls = methods.info(self.method).cls
        name = cls.run_optimizer if self.solver == "auto" else self.solver
        rate = self.learning_rate_init
        if rate is None:
            rate = cls.run_lr if name == cls.run_optimizer else None
        return name, RATES[name] if rate is None else float(rate)

    def _check_budget(self, entry: MethodInfo, *, sparse: bool, ends: bool) -> None:
        """Raise ValueError for what the method cannot do.

        sparse: whether it goes on with a sparse network. ends: whether the end of the training is
        known.
        """
        method = f"method={self.method!r}"
        if not ends and (entry.cls.starts_dense or entry.start_density is not None):
            raise ValueError(
                f"{method} begins above its budget and comes down to it in a training of known "
                "length, and partial_fit has no end: use fit, or a method that keeps its budget, "
                "such as 'set'"
            )
        if not entry.cls.starts_dense:
            return
        if sparse:
            raise ValueError(
                f"{method} begins with a dense network, and warm_start=True goes on with a sparse "
                "one: use a method that begins sparse, such as 'set'"
            )
        given = self.density is not None or self.connections is not None
        if given and "density" not in entry.parameters():
            raise ValueError(
                f"{method} finds out how many connections to keep: leave density and connections "
                "out, or use a method with a budget, such as 'gmp'"
            )

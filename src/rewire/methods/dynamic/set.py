"""SET: sparse evolutionary training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from rewire.methods.core.base import Moments
from rewire.methods.core.registry import register
from rewire.methods.core.settings import choice
from rewire.methods.core.updates import LAST, in_epochs
from rewire.methods.criteria.drop import MagnitudeBySign
from rewire.methods.criteria.grow import Random
from rewire.methods.dynamic.rewirer import Rewirer, normal_values
from rewire.schedules import Schedule

__all__ = ["SET"]


#: Updates that a training of known length has room for at least.
_LEAST = 90


@register(
    name="set",
    paper="Mocanu et al., Nature Communications 2018 (doi 10.1038/s41467-018-04316-3)",
    summary="after every epoch, replace the weakest positive and negative weights by random "
    "connections",
    keeps_budget="every step",
    guarantees=("K exact in every layer at every moment", "the same share of each sign is dropped"),
)
class SET(Rewirer):
    """At the end of every epoch but the last, in each layer::

        drop  floor(zeta n+) smallest of the n+ positive weights
              and floor(zeta n-) largest of the n- negative weights
        grow  as many, uniformly over the dormant positions (just-dropped ones included)

    Optimizer state of new connections starts afresh. The authors' Keras code is
    ``new_values="zero", momentum="reset"`` (and rewires after the last epoch too: leave ``last``
    out in `end_epoch`), their SciPy code ``new_values="normal", momentum="keep"``.

    Args:
        fraction: zeta, the share to replace at an update; a float or a schedule over epochs.
            (`rewire train` takes 0.15 where updates come more often than epochs.)
        new_values: "zero", or "normal" for N(0, 0.1^2).
        momentum: what becomes of the optimizer state of survivors: "keep", or "reset", which clears
            all state of all parameters at every update, as a new optimizer would.
        every: "epoch", or a number of optimizer steps; by default "epoch", or in a training of
            known length as often as 90 updates need: on the digits at 2 % in 20 epochs 95.9 %, with
            60 updates 94.8 % (mean of six seeds).
        until: no update after this many epochs (or steps); by default three quarters of a training
            of known length, else never stopping.
        steps, epochs: of the whole training; `rewire train` gives them.

    Cost: O(K log K) per update.
    """

    keeps_limits: ClassVar[tuple[str, ...]] = ("fan-in", "fan-out", "block")

    @classmethod
    def run_options(cls, epochs: int, given: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
        """Half the share where updates come more often than epochs."""
        often = int(LAST * epochs) < _LEAST and not given.keys() & {"fraction", "every", "until"}
        return {"fraction": 0.15} if often else {}

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        fraction: float | Schedule = 0.3,
        new_values: Literal["zero", "normal"] = "zero",
        momentum: Literal["keep", "reset"] = "keep",
        every: int | Literal["epoch"] | None = None,
        until: int | None = None,
        moments: Moments = "auto",
        steps: int | None = None,
        epochs: int | None = None,
        seed: int | None = None,
    ) -> None:
        choice("new_values", new_values, ("zero", "normal"))
        every, until = in_epochs(
            every, until, steps, epochs, scheduled=callable(fraction), least=_LEAST
        )
        super().__init__(
            model,
            optimizer,
            drop=MagnitudeBySign(),
            grow=Random(),
            fraction=fraction,
            every=every,
            until=until,
            values=normal_values(0.1) if new_values == "normal" else None,
            momentum=momentum,
            moments=moments,
            seed=seed,
        )

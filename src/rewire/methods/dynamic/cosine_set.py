"""CosineSET: SET guided by the cosine similarity of the activations at the two ends of a
connection.

Five methods, of three removals and three additions; SET itself is the sixth.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from rewire.methods.core.base import Data, Moments
from rewire.methods.core.registry import register
from rewire.methods.core.settings import needs_data
from rewire.methods.core.updates import in_epochs
from rewire.methods.criteria.activations import Mode, Which
from rewire.methods.criteria.drop import MagnitudeBySign
from rewire.methods.criteria.grow import Cosine, Random
from rewire.methods.criteria.similarity import Similarity
from rewire.methods.dynamic.rewirer import Rewirer
from rewire.schedules import Schedule

__all__ = ["CoDACoRSET", "CoDASET", "CoPACoRSET", "CoPASET", "CoRSET"]

_PAPER = "Pieterse, Mocanu 2019 (arXiv 1903.07138v1)"
_GUARANTEES = ("K exact in every layer at every moment", "the same share of each sign is dropped")


class _CosineSET(Rewirer):
    #: Whether removal ranks weight times similarity, and how addition uses similarity, if it does.
    removal: ClassVar[bool]
    addition: ClassVar[Literal["top", "proportional"] | None]
    keeps_limits: ClassVar[tuple[str, ...]] = ("fan-in", "fan-out", "block")

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        data: Data | None = None,
        fraction: float | Schedule = 0.3,
        samples: int | None = None,
        mode: Mode = "eval",
        activations: Which = "pre",
        output_layer: bool = False,
        centred: bool = True,
        candidates: int | None = None,
        momentum: Literal["keep", "reset"] = "keep",
        every: int | Literal["epoch"] | None = None,
        until: int | None = None,
        moments: Moments = "auto",
        steps: int | None = None,
        epochs: int | None = None,
        seed: int | None = None,
    ) -> None:
        if data is None:
            raise needs_data(self)
        every, until = in_epochs(every, until, steps, epochs, scheduled=callable(fraction))
        source = Similarity(
            model,
            data,
            samples=samples,
            mode=mode,
            activations=activations,
            output_layer=output_layer,
            centred=centred,
        )
        super().__init__(
            model,
            optimizer,
            drop=MagnitudeBySign(source if self.removal else None),
            grow=Random() if self.addition is None else Cosine(source, self.addition, candidates),
            fraction=fraction,
            every=every,
            until=until,
            momentum=momentum,
            moments=moments,
            seed=seed,
        )


_SHARED = """
    Sim(r, c) = abs(cosine) of what input c and output r of a layer do over the data, both taken
    before activation functions (`rewire.methods.criteria.activations`). At the end of every epoch
    but the last, in each layer but the output layer (which does as SET does)::

        drop  {drop}
        grow  {grow}

    New connections start at 0, just-dropped positions are candidates, other connections keep their
    values.

    Args:
        data: the training data (of several ranks, each its own part), see
            `rewire.methods.core.base.Data`.
        fraction: zeta, the share to replace per epoch; a float or a schedule over epochs.
        samples: rows of data to look at, drawn anew for each update; None for all of them, as the
            authors do.
        mode: "eval", or "train" for dropout on while looking, as in the authors' code.
        activations: "pre" (outputs of layers before activation functions) or "post".
        centred: in the first layer, take the inputs from their means over the data. The authors
            standardise their data, which does the same; of other inputs, such as pixels between 0
            and 1, the cosine says how bright they are on average, and not whether they vary with
            the unit (see docs/defaults.md).
        output_layer: use similarities in the output layer too (the authors' is dense).
        candidates: random dormant positions per new connection to choose from; None for all there
            are, or for 4 in layers of more than 2^28 positions.
        momentum: of survivors, "keep" it or "reset" all optimizer state of the model at every
            update, as the authors' Keras code does.
        every: "epoch", or a number of optimizer steps; by default "epoch", or in a training of
            known length as often as 10 updates need.
        until: no update after this many epochs (or steps); by default three quarters of a training
            of known length, else never stopping.
        steps, epochs: of the whole training; `rewire train` gives them.

    Cost per update: a forward pass over the rows and O(rows M) time for each layer (without
    addition by similarity, or with ``candidates``, O(rows K)); O(rows x features + K) memory, in
    tiles, never M.
"""
_MAGNITUDE = "SET's: floor(zeta n) weakest of the n weights of each sign"
_WEIGHTED = "the same rule on w Sim: floor(zeta n) weakest of the n of each sign"
_RANDOM = "as many, uniformly over the dormant positions"
_TOP = "as many, the dormant positions of highest Sim"
_DRAWN = "as many, drawn from the dormant positions one after the other, with P proportional to Sim"


def _describe(first: str, drop: str, grow: str) -> str:
    return f"{first}\n{_SHARED.format(drop=drop, grow=grow)}"


@register(
    name="codaset",
    paper=_PAPER,
    summary="SET that grows the connections between the most similar units",
    keeps_budget="every step",
    guarantees=_GUARANTEES,
    needs="activations",
)
class CoDASET(_CosineSET):
    __doc__ = _describe(
        "CosineSET with deterministic addition; its topology may freeze.", _MAGNITUDE, _TOP
    )
    removal, addition = False, "top"


@register(
    name="copaset",
    paper=_PAPER,
    summary="SET that draws new connections in proportion to the similarity of the units at "
    "their ends",
    keeps_budget="every step",
    guarantees=_GUARANTEES,
    needs="activations",
)
class CoPASET(_CosineSET):
    __doc__ = _describe("CosineSET with probabilistic addition.", _MAGNITUDE, _DRAWN)
    removal, addition = False, "proportional"


@register(
    name="corset",
    paper=_PAPER,
    summary="SET that drops the weakest weights times similarity, and grows at random",
    keeps_budget="every step",
    guarantees=_GUARANTEES,
    needs="activations",
)
class CoRSET(_CosineSET):
    __doc__ = _describe("CosineSET with removal by weight times similarity.", _WEIGHTED, _RANDOM)
    removal, addition = True, None


@register(
    name="codacorset",
    paper=_PAPER,
    summary="drops the weakest weights times similarity, grows between the most similar units",
    keeps_budget="every step",
    guarantees=_GUARANTEES,
    needs="activations",
)
class CoDACoRSET(_CosineSET):
    __doc__ = _describe(
        "CosineSET with deterministic addition, and removal by weight times similarity.",
        _WEIGHTED,
        _TOP,
    )
    removal, addition = True, "top"


@register(
    name="copacorset",
    paper=_PAPER,
    summary="drops the weakest weights times similarity, draws new connections in proportion to "
    "similarity",
    keeps_budget="every step",
    guarantees=_GUARANTEES,
    needs="activations",
)
class CoPACoRSET(_CosineSET):
    __doc__ = _describe(
        "CosineSET with probabilistic addition, and removal by weight times similarity.",
        _WEIGHTED,
        _DRAWN,
    )
    removal, addition = True, "proportional"

"""CTRE: cosine similarity and random topology exploration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rewire import random
from rewire.methods.core.base import Evaluate, Pool, Purpose
from rewire.methods.core.parameters import Epochs, fraction_field, parameter, setting
from rewire.methods.core.registry import register
from rewire.methods.core.runs import Run
from rewire.methods.criteria.activations import Which
from rewire.methods.criteria.drop import ByMagnitude
from rewire.methods.criteria.grow import BySimilarity, Random, random_dormant
from rewire.methods.dynamic.similar import BySimilarActivations
from rewire.schedules import Schedule

__all__ = ["CTRE"]


@dataclass(frozen=True)
class _SimilarElsewhere(BySimilarity):
    """The most similar positions; those among them that were just dropped are replaced by random
    ones.
    """

    def __call__(
        self, pool: Pool, dropped: Tensor, count: int, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        rows, cols = super().__call__(pool, dropped, count, seed, step)
        new = ~torch.isin(_keys(pool, rows, cols), pool.keys(dropped))
        rows, cols, lacking = rows[new], cols[new], count - int(new.sum())
        room = pool.weight.dormant + dropped.numel()
        # A random set that has enough others even if it has all of the picks; of the others, a
        # random subset.
        more = random_dormant(pool, dropped, min(room, count), seed, step)
        keys = _keys(pool, *more)
        other = (~torch.isin(keys, _keys(pool, rows, cols))).nonzero().flatten()
        order = random.bits(seed, step, pool.stream(Purpose.REDRAW), keys[other])
        chosen = other[torch.sort(order, stable=True).indices[:lacking]]
        return torch.cat([rows, more[0][chosen]]), torch.cat([cols, more[1][chosen]])


def _keys(pool: Pool, rows: Tensor, cols: Tensor) -> Tensor:
    return rows.long() * pool.weight.matrix_shape[1] + cols.long()


def _uniform_values(pool: Pool, count: int, seed: int, step: int) -> Tensor:
    """New connections start at U(-m, m), m the mean magnitude of the connections there are."""
    weight = pool.weight
    mean = weight.values.abs().sum() / weight.connections
    counter = torch.arange(count, dtype=torch.int64, device=weight.device)
    uniform = random.bits(seed, step, pool.stream(Purpose.VALUE), counter).double() * 2.0**-62 - 1
    return mean.detach() * uniform.to(weight.dtype)


@register(
    name="ctre",
    paper="Atashgahi, Pieterse, Liu, Mocanu, Veldhuis, Pechenizkiy, Machine Learning 2022 (arXiv "
    "1903.07138v3)",
    summary="drops the smallest weights, grows between the most similar units, and at random "
    "where that stands still",
    guarantees=("K exact in every layer at every moment",),
    needs="activations",
)
class CTRE(BySimilarActivations):
    """At the end of every epoch but the last, in each layer, the output layer included::

        drop  floor(zeta K) connections of smallest magnitude, of both signs together
        grow  as many, the dormant positions of highest abs(cosine) of the activations

    ``variant="sim"``: positions among these that were just dropped are replaced by uniformly random
    ones (uniform over what is neither kept nor picked; the authors' code may pick a position
    twice). ``variant="seq"``: by similarity until the validation score has not risen for
    ``patience`` epochs, then at random for good; it needs `end_epoch` to be given ``evaluate`` (in
    `rewire train`, a validation split).

    A connection that is dropped and grown at once stays as it was, its optimizer state too.

    Cost per update: as CosineSET's.
    """

    variant: Literal["sim", "seq"] = setting(default="sim", help="CTRE_sim or CTRE_seq, see above")
    fraction: float | Schedule = fraction_field(0.2, "zeta, the share to replace at an update")
    patience: Epochs = setting(
        default=40, help='epochs without a better score after which "seq" turns to random growth'
    )
    activations: Which = parameter(
        default="post", help='outputs of layers behind activation functions, or before ("pre")'
    )
    new_values: Literal["uniform", "zero"] = parameter(
        default="uniform",
        help="of grown connections: U(-m, m) with m the mean magnitude of the layer's connections, "
        "as the authors run it, or 0",
    )

    drop = ByMagnitude()
    regrown = "keep"
    saves = ("_best", "_since")

    @classmethod
    def run_options(cls, run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
        """New connections start at 0: random values would disturb a short run to its end."""
        return {"new_values": "zero"}

    def _check(self) -> None:
        if self.variant == "seq":
            if self.every is not None:
                raise ValueError(
                    "variant='seq' decides by scores, which there are at the end of epochs: give "
                    "every_epochs= instead of every="
                )
            self.every_epochs = self.every_epochs or 1
        super()._check()
        source = self._similarity(output_layer=True)
        kind = _SimilarElsewhere if self.variant == "sim" else BySimilarity
        self.grow = self._similar = kind(source, "top", self.candidates)
        self.values = _uniform_values if self.new_values == "uniform" else None

    def _setup(self) -> None:
        super()._setup()
        self._best: float | None = None
        self._since = 0

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        if self.variant == "seq" and self._since < self.patience:
            if evaluate is None:
                raise ValueError(
                    "CTRE's variant 'seq' turns by the validation score: call end_epoch(evaluate), "
                    "a function of the model, or choose variant='sim'"
                )
            score = float(evaluate(self.model))
            better = self._best is None or score > self._best
            self._best, self._since = (score, 0) if better else (self._best, self._since + 1)
        self.grow = Random() if self._since >= self.patience else self._similar
        super()._after_epoch(evaluate, last)

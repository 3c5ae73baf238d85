"""CTRE: cosine similarity and random topology exploration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire import random
from rewire.methods.core.base import Data, Evaluate, Moments, Pool, Purpose
from rewire.methods.core.registry import register
from rewire.methods.core.settings import choice, needs_data
from rewire.methods.core.updates import in_epochs
from rewire.methods.criteria.activations import Mode, Which
from rewire.methods.criteria.drop import Magnitude
from rewire.methods.criteria.grow import Cosine, Random, random_dormant
from rewire.methods.criteria.similarity import Similarity
from rewire.methods.dynamic.rewirer import Rewirer
from rewire.schedules import Schedule

__all__ = ["CTRE"]


@dataclass(frozen=True)
class _CosineElsewhere(Cosine):
    """The most similar positions; those among them that were just dropped are replaced by random
    ones.
    """

    def __call__(
        self, pool: Pool, dropped: Tensor, count: int, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        rows, cols = super().__call__(pool, dropped, count, seed, step)
        new = ~torch.isin(
            _keys(pool, rows, cols),
            _keys(pool, pool.weight.rows[dropped], pool.weight.cols[dropped]),
        )
        rows, cols, lacking = rows[new], cols[new], count - int(new.sum())
        room = pool.weight.size - pool.weight.connections + dropped.numel()
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
    keeps_budget="every step",
    guarantees=("K exact in every layer at every moment",),
    needs="activations",
)
class CTRE(Rewirer):
    """At the end of every epoch but the last, in each layer, the output layer included::

        drop  floor(zeta K) connections of smallest magnitude, of both signs together
        grow  as many, the dormant positions of highest abs(cosine) of the activations

    ``variant="sim"``: positions among these that were just dropped are replaced by uniformly random
    ones (uniform over what is neither kept nor picked; the authors' code may pick a position
    twice). ``variant="seq"``: by similarity until the validation score has not risen for
    ``patience`` epochs, then at random for good; it needs `end_epoch` to be given ``evaluate`` (in
    `rewire train`, a validation split).

    A connection that is dropped and grown at once stays as it was, its optimizer state too.

    Args:
        data: the training data (of several ranks, each its own part), see
            `rewire.methods.core.base.Data`.
        variant: "sim" (CTRE_sim) or "seq" (CTRE_seq).
        fraction: zeta, the share to replace per epoch; a float or a schedule over epochs.
        patience: epochs without a better score after which "seq" turns to random growth.
        samples: rows of data to look at, drawn anew for each update; None for all of them, as the
            authors do.
        mode: "eval", or "train" for dropout on while looking.
        activations: "post", or "pre" for what CosineSET looks at.
        candidates: as in CosineSET: random dormant positions per new connection to choose from;
            None for all there are, or for 4 in layers of more than 2^28 positions.
        new_values: "uniform", U(-m, m) with m the mean magnitude of the layer's connections, as the
            authors run it, or "zero".
        steps, epochs: of the whole training; `rewire train` gives them. Updates then stop after
            three quarters of it, and "sim" has as many as 10 where epochs are fewer.

    Cost per update: as CosineSET's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        data: Data | None = None,
        variant: Literal["sim", "seq"] = "sim",
        fraction: float | Schedule = 0.2,
        patience: int = 40,
        samples: int | None = None,
        mode: Mode = "eval",
        activations: Which = "post",
        candidates: int | None = None,
        new_values: Literal["uniform", "zero"] = "uniform",
        moments: Moments = "auto",
        steps: int | None = None,
        epochs: int | None = None,
        seed: int | None = None,
    ) -> None:
        choice("variant", variant, ("sim", "seq"))
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience must be a number of epochs of at least 1, not {patience!r}")
        choice("new_values", new_values, ("uniform", "zero"))
        if data is None:
            raise needs_data(self)
        # "seq" decides by scores, which there are at the end of epochs only.
        every, until = in_epochs(
            None, None, steps, epochs, scheduled=variant == "seq" or callable(fraction)
        )
        source = Similarity(
            model, data, samples=samples, mode=mode, activations=activations, output_layer=True
        )
        self._cosine = (_CosineElsewhere if variant == "sim" else Cosine)(source, "top", candidates)
        super().__init__(
            model,
            optimizer,
            drop=Magnitude(),
            grow=self._cosine,
            fraction=fraction,
            values=_uniform_values if new_values == "uniform" else None,
            every=every,
            until=until,
            regrown="keep",
            moments=moments,
            seed=seed,
        )
        self.variant, self.patience = variant, patience
        self._best: float | None = None
        self._since = 0

    def _limits_kept(self) -> tuple[str, ...]:
        return self.keeps_limits  # none: what replaces a pick is not looked at

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"variant": self.variant, "patience": self.patience}

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        if self.variant == "seq" and self._since < self.patience:
            if evaluate is None:
                raise ValueError(
                    "CTRE's variant 'seq' turns by the validation score: call "
                    "end_epoch(evaluate), a function of the "
                    "model, or choose variant='sim'"
                )
            score = float(evaluate(self.model))
            better = self._best is None or score > self._best
            self._best, self._since = (score, 0) if better else (self._best, self._since + 1)
        self.grow = Random() if self._since >= self.patience else self._cosine
        super()._after_epoch(evaluate, last)

    def _state(self) -> dict[str, Any]:
        return {"best": self._best, "since": self._since}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._best, self._since = state["best"], int(state["since"])

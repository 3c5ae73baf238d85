"""What methods share that drop or grow by the similarity of activations."""

from __future__ import annotations

from typing import Any

from rewire.methods.core.base import Data
from rewire.methods.core.parameters import Count, data_field, parameter
from rewire.methods.core.refusals import needs_data
from rewire.methods.criteria.activations import Mode, Which
from rewire.methods.criteria.similarity import Similarity
from rewire.methods.dynamic.rewirer import Rewiring

__all__ = ["BySimilarActivations"]


class BySimilarActivations(Rewiring):
    """A `Rewiring` that looks at activations before an update (`Similarity`)."""

    data: Data | None = data_field()
    samples: Count | None = parameter(
        default=None,
        help="rows of data to look at, drawn anew for each update; None for all, as the authors do",
    )
    mode: Mode = parameter(
        default="eval",
        help='how the model runs while looking; "train": dropout on, as in CosineSET\'s code',
    )
    activations: Which = parameter(
        default="pre", help='outputs of layers before ("pre") or behind activation functions'
    )
    candidates: Count | None = parameter(
        default=None,
        help="random dormant positions per new connection to choose from; None for all there are, "
        "or for 4 in layers of more than 2^28 positions",
    )

    def _similarity(self, **options: Any) -> Similarity:
        """Of the model over ``data``, with the options of `Similarity` that the method fixes."""
        if self.data is None:
            raise needs_data(self)
        return Similarity(
            self.model,
            self.data,
            samples=self.samples,
            mode=self.mode,
            activations=self.activations,
            **options,
        )

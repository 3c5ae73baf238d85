"""CosineSET: SET guided by the cosine similarity of the activations at the two ends of a
connection.

Five methods, of two removals and three additions; SET itself is the sixth.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from rewire.methods.core.parameters import fraction_field, parameter
from rewire.methods.core.registry import register
from rewire.methods.criteria.drop import ByMagnitudeAndSign
from rewire.methods.criteria.grow import BySimilarity, Random
from rewire.methods.dynamic.rewirer import optimizer_state_field
from rewire.methods.dynamic.similar import BySimilarActivations
from rewire.schedules import Schedule

__all__ = ["CoDACoRSET", "CoDASET", "CoPACoRSET", "CoPASET", "CoRSET", "CosineSET"]


class CosineSET(BySimilarActivations):
    """Sim(r, c) = abs(cosine) of what input c and output r of a layer do over the data, both taken
    before activation functions (`rewire.methods.criteria.activations`). At the end of every epoch
    but the last, in each layer but the output layer (which does as SET does)::

        drop  floor(zeta n) weakest of the n weights of each sign, by |w| (as SET) or by |w| Sim
        grow  as many dormant positions: at random (as SET), those of highest Sim, or drawn one
              after the other with P proportional to Sim

    New connections start at 0, just-dropped positions are candidates, other connections keep their
    values.

    Cost per update: a forward pass over the rows and O(rows M) time for each layer (without
    addition by similarity, or with ``candidates``, O(rows K)); O(rows x features + K) memory, in
    tiles, never M.
    """

    fraction: float | Schedule = fraction_field(0.3, "zeta, the share to replace at an update")
    output_layer: bool = parameter(
        default=False, help="use similarities in the output layer too (the authors' is dense)"
    )
    centred: bool = parameter(
        default=True,
        help="in the first layer, take the inputs from their means over the data, which the "
        "authors' standardised data have already; as they are, the cosine of pixels between 0 and "
        "1 says how bright they are, not whether they vary with the unit (see docs/defaults.md)",
    )
    optimizer_state: Literal["keep", "reset"] = optimizer_state_field("the authors' code does")

    keeps_limits = ("fan-in", "fan-out", "block")
    #: Whether removal ranks weight times similarity, and how addition uses similarity, if it does.
    removal: ClassVar[bool]
    addition: ClassVar[Literal["top", "proportional"] | None]

    def _check(self) -> None:
        super()._check()
        source = self._similarity(output_layer=self.output_layer, centred=self.centred)
        self.drop = ByMagnitudeAndSign(source if self.removal else None)
        near = self.addition and BySimilarity(source, self.addition, self.candidates)
        self.grow = near or Random()


def _variant(
    cls: str, removal: bool, addition: Literal["top", "proportional"] | None, summary: str
) -> type[CosineSET]:
    """One of the five: ``cls`` is what the library calls it, in lower case the command line."""
    doc = f"CosineSET that {summary}.\n\n    {CosineSET.__doc__}"
    body = {"__doc__": doc, "__module__": __name__, "removal": removal, "addition": addition}
    return register(
        name=cls.lower(),
        paper="Pieterse, Mocanu 2019 (arXiv 1903.07138v1)",
        summary=summary,
        guarantees=(
            "K exact in every layer at every moment",
            "the same share of each sign is dropped",
        ),
        needs="activations",
    )(type(cls, (CosineSET,), body))


_WEAK = "drops the weakest weights times similarity"
_NEAR, _DRAWN = "grows between the most similar units", "in proportion to similarity"

CoDASET = _variant("CoDASET", False, "top", f"{_NEAR}, where its topology may freeze")
CoPASET = _variant("CoPASET", False, "proportional", f"draws new connections {_DRAWN}")
CoRSET = _variant("CoRSET", True, None, f"{_WEAK}, and grows at random")
CoDACoRSET = _variant("CoDACoRSET", True, "top", f"{_WEAK}, {_NEAR}")
CoPACoRSET = _variant("CoPACoRSET", True, "proportional", f"{_WEAK}, draws new ones {_DRAWN}")

"""What criteria, to drop or to grow by, may ask of the method that uses them."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from rewire.methods.core.base import Pool
from rewire.methods.criteria.gradients import CandidateCount
from rewire.methods.criteria.similarity import Similarity

__all__ = ["Criterion"]


class Criterion(ABC):
    """The optional parts of a criterion; `Drop` and `Grow` say what it must do."""

    #: "gradients": `request` is called before the step whose gradients an update uses. "last
    #: gradient": ``pool.gradient`` is the gradient of the last step before an update.
    needs: ClassVar[str] = ""
    #: Similarities to record before an update, and to forget after it.
    source: Similarity | None = None
    #: With ``needs = "gradients"``: see `rewire.methods.criteria.gradients.sampled`.
    candidates: CandidateCount = None

    def request(self, pool: Pool, seed: int, step: int) -> None:
        """Ask for the gradients of step ``step``, the next one."""

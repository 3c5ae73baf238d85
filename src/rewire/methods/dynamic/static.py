"""Fixed random connectivity: the baseline every rewiring method must beat."""

from __future__ import annotations

from rewire.methods.core.base import Method, Moments
from rewire.methods.core.parameters import moments_field
from rewire.methods.core.registry import register

__all__ = ["Static"]


@register(
    name="static",
    paper="baseline of Bellec et al., ICLR 2018 (arXiv 1711.05136)",
    summary="fixed random connectivity: the topology drawn at the start never changes",
    guarantees=("K exact in every layer at every moment", "topology never changes"),
)
class Static(Method):
    """Train the connections there are, the paper's baseline: same K, plain optimizer, no signs, no
    noise, no L1.

    Cost: nothing.
    """

    moments: Moments = moments_field()

    keeps_prior = True
    keeps_limits = ("fan-in", "fan-out", "block")

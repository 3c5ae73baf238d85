"""GMP: gradual magnitude pruning."""

from __future__ import annotations

from typing import Literal

from rewire.methods.core.registry import register
from rewire.methods.pruning.gradual import Gradual
from rewire.methods.pruning.shrink import scope_field

__all__ = ["GMP"]


@register(
    name="gmp",
    paper="Zhu and Gupta 2017 (arXiv 1710.01878)",
    summary="drop the smallest weights every 100 steps, along a cubic schedule from a dense start",
    guarantees=(
        "the schedule's K exact after every cut",
        "what is dropped never returns",
        "K at the end",
    ),
)
class GMP(Gradual):
    """Every ``every`` steps from ``begin`` to ``until``, drop the smallest |w| down to, with K_0 at
    the start,

        K_t = K + (K_0 - K) (1 - (t - begin) / (until - begin))^3

    and train what is left. Storage shrinks with it.

    Cost: that of the connections there are, from O(M) to O(K).
    """

    scope: Literal["layer", "network"] = scope_field(
        "layer", "magnitudes and budget are each layer's (the paper's uniform schedule), or of all"
    )

"""SNIP: choose the connections before training, by what the loss says about them at
initialisation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from rewire.methods.core.base import Pool
from rewire.methods.core.parameters import Count, setting
from rewire.methods.core.pool import gradient_scale
from rewire.methods.core.registry import register
from rewire.methods.pruning.shrink import Shrinking, scope_field

__all__ = ["SNIP"]


@register(
    name="snip",
    paper="Lee, Ajanthan, Torr, ICLR 2019 (arXiv 1810.02340)",
    summary="before training, keep the connections with the largest |w dL/dw| on the first batches",
    guarantees=(
        "K exact from the first trained step on",
        "no layer is emptied",
        "initial values are not touched",
    ),
    needs="gradients",
)
class SNIP(Shrinking):
    """Single-shot pruning by connection sensitivity, at initialisation::

        s_k = | w_k  dL/dw_k |   keep the K largest over all layers, train from their initial values

    The first ``batches`` calls of ``optimizer.step()`` only measure: they take the gradients of all
    connections and change nothing (they clear the gradients, so neither weights nor optimizer state
    move, nor do other parameters of the same optimizer). The last of them makes the cut. Gradients
    of the batches are summed before the magnitude is taken: n batches measure what one of n times
    the size would.

    Cost: ``batches`` passes over the connections there are (all M, normally), O(K) from then on.
    """

    batches: Count = setting(
        default=1,
        help="optimizer steps that measure; each may be of several accumulated micro-batches",
    )
    scope: Literal["layer", "network"] = scope_field(
        "network",
        "rank all layers together, as in the paper (then the sum of the budget counts), "
        "or within each layer",
    )
    at_least: Count = setting(
        default=1, help="connections that every layer keeps, whatever its scores"
    )

    saves = ("done", "_measured", "_gradients")

    def _setup(self) -> None:
        super()._setup()
        if not any(bool(pool.weight.values.any()) for pool in self.pools):
            raise ValueError(
                "SNIP ranks connections by |w dL/dw|, and all values are 0, as differences beside "
                "dense weights (rewire.adapt) are at first: choose a method that looks at "
                "gradients alone, such as RigL"
            )
        assert self.final is not None
        for pool, k in zip(self.pools, self.final, strict=True):
            most = pool.weight.connections if self.scope == "network" else k
            if self.at_least > most:
                raise ValueError(
                    f"at_least must be at most {most}, what {pool.name} may have, not "
                    f"{self.at_least}"
                )
        if self.at_least * len(self.pools) > sum(self.final):
            raise ValueError(
                f"at_least={self.at_least} in each of {len(self.pools)} weights is more than the "
                f"budget of {sum(self.final)}"
            )
        self.done = False
        #: Of each pool: sum of gradients in slot order, and how many steps are in it.
        self._gradients: list[Tensor | None] = [None] * len(self.pools)
        self._measured = [0] * len(self.pools)
        self._before_step(SNIP._measure)

    @torch.no_grad()
    def _measure(self, optimizer: Optimizer) -> None:
        if self.done:
            return
        mine = [pool for pool in self._trained() if pool.optimizer is optimizer]
        if not any(pool.weight.values.grad is not None for pool in mine):
            return
        divisor = gradient_scale(optimizer)
        for pool in mine:
            gradient, total = pool.weight.values.grad, self._gradients[pool.number]
            self._measured[pool.number] += 1
            if gradient is not None and self._measured[pool.number] <= self.batches:
                gradient = gradient / divisor
                self._gradients[pool.number] = gradient if total is None else total + gradient
        for trained in self._attachment.parameters(optimizer):
            trained.grad = None
        if all(self._measured[pool.number] >= self.batches for pool in self._trained()):
            assert self.final is not None
            self._cut(self.final, at_least=self.at_least)
            self._gradients = [None] * len(self.pools)
            self.done = True

    def _schedule(self) -> str | None:
        return f"batches={self.batches} optimizer steps that measure"

    def _scores(self, pool: Pool) -> Tensor:
        slots, gradient = pool.weight.active(), self._gradients[pool.number]
        values = pool.weight.values.detach()[slots]
        if gradient is None:  # finalized before anything was measured: magnitude is what there is
            return values.abs() if not any(self._measured) else torch.zeros_like(values)
        return (values * gradient[slots]).abs()

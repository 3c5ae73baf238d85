"""SNIP: choose the connections before training, by what the loss says about them at
initialisation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.methods.core.attachment import gradient_scale
from rewire.methods.core.base import Pool
from rewire.methods.core.registry import register
from rewire.methods.pruning.shrink import Connections, Density, Shrinking

__all__ = ["SNIP"]


@register(
    name="snip",
    paper="Lee, Ajanthan, Torr, ICLR 2019 (arXiv 1810.02340)",
    summary="before training, keep the connections with the largest |w dL/dw| on the first batches",
    keeps_budget="every update",
    guarantees=(
        "K exact from the first trained step on",
        "no layer is emptied",
        "initial values are not touched",
    ),
    memory="O(M)",
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

    Args:
        batches: optimizer steps that measure; each may itself be of several accumulated
            micro-batches.
        scope: "network" ranks all layers together, as in the paper; "layer" within each layer.
        at_least: connections that every layer keeps, whatever its scores.
        connections, density, distribution: the final budget, see
            `rewire.methods.pruning.shrink.final_budgets`. With scope "network" its sum counts.

    Cost: ``batches`` passes over the connections there are (all M, normally), O(K) from then on.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        batches: int = 1,
        scope: Literal["layer", "network"] = "network",
        at_least: int = 1,
        connections: Connections | None = None,
        density: Density | None = None,
        distribution: str = "erk",
        seed: int | None = None,
    ) -> None:
        for name, number in (("batches", batches), ("at_least", at_least)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {number!r}")
        self.batches = batches
        super().__init__(
            model,
            optimizer,
            connections=connections,
            density=density,
            distribution=distribution,
            scope=scope,
            seed=seed,
        )
        assert self.final is not None
        self.at_least = at_least
        for pool, k in zip(self.pools, self.final, strict=True):
            most = pool.weight.connections if scope == "network" else k
            if at_least > most:
                raise ValueError(
                    f"at_least must be at most {most}, what {pool.name} may have, not {at_least}"
                )
        if at_least * len(self.pools) > sum(self.final):
            raise ValueError(
                f"at_least={at_least} in each of {len(self.pools)} weights is more than the "
                f"budget of {sum(self.final)}"
            )
        self.done = False
        #: Of each pool: sum of gradients in slot order, and how many steps are in it.
        self._gradients: list[Tensor | None] = [None] * len(self.pools)
        self._measured = [0] * len(self.pools)
        here = weakref.ref(self)

        def before(stepping: Optimizer) -> None:
            method = here()
            if method is not None:
                method._measure(stepping)

        self._attachment.before_step(before)

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
        for parameter in self._attachment.parameters(optimizer):
            parameter.grad = None
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

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"batches": self.batches, "at_least": self.at_least}

    def _state(self) -> dict[str, Any]:
        gradients = {
            pool.name: g.clone()
            for pool, g in zip(self.pools, self._gradients, strict=True)
            if g is not None
        }
        return {"done": self.done, "measured": list(self._measured), "gradients": gradients}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        done, measured = bool(state["done"]), [int(n) for n in state["measured"]]
        gradients = [
            state["gradients"][pool.name].to(pool.weight.device, copy=True)
            if pool.name in state["gradients"]
            else None
            for pool in self.pools
        ]
        self.done, self._measured, self._gradients = done, measured, gradients

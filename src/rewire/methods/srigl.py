"""SRigL: structured RigL, a constant fan-in for every neuron."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire import random, topology
from rewire.methods.base import Pool, Purpose
from rewire.methods.drop import Magnitude
from rewire.methods.grow import Gradient
from rewire.methods.registry import register
from rewire.methods.rewirer import Rewirer
from rewire.methods.rigl import decay, share_of
from rewire.methods.topk import TILE_ELEMENTS, Gradients, gradient_block, top
from rewire.schedules import Schedule, within

__all__ = ["SRigL"]


@register(
    name="srigl",
    paper="Lasby et al., ICLR 2024 (arXiv 2305.02299)",
    summary="RigL with the same fan-in for every neuron, and neurons without salient weights taken out",
    keeps_budget="at most",
    guarantees=("every live neuron of a layer has the same fan-in at every moment", "never more than K in a layer"),
    needs="gradients",
)
class SRigL(Rewirer):
    """Every ``every`` steps until T_end, in each layer with fan-in k::

        n        floor(f K),  f(t) as RigL's
        salient  all but the n smallest |w|, and the n largest |dL/dw| among the other positions
        ablate   neurons with fewer than max(1, gamma k) salient positions; at least one stays
        k        floor(K / neurons left), at most the number of inputs
        drop     what is not salient, and the smallest |w| of neurons that have more than k left
        grow     in each neuron the largest |dL/dw| until it has k

    A neuron is a row of the weight (an output, an output channel, a gate's unit). An ablated one has no connections and
    may come back when enough of its gradients are among the n largest. Making the method evens out the layers: neurons
    with more than floor(K / neurons) connections lose the smallest, the others get random ones with the values of those
    lost. At most neurons - 1 connections of K stay unused, from rounding.

    Args:
        fraction: alpha, the share to replace at the start; a schedule (over steps) is taken as it is.
        gamma: share of the fan-in that must be salient; 0 turns ablation off (but for neurons with nothing salient).
        every: steps between updates (Delta T).
        until: T_end, the last step that may update; by default 3/4 of ``steps`` where those are known.
        steps: of the whole training; `rewire train` gives it.

    Gradients are exact, so compiled layers cannot be trained with it. That ablated neurons may return is recalled, not
    read. Cost: O(M samples) time per update, O(K) memory besides the step's activations.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        fraction: float | Schedule = 0.3,
        gamma: float = 0.3,
        every: int = 100,
        until: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.gamma = within("gamma", gamma, 0.0, 1.0)
        until = share_of(steps, until, 0.75)
        super().__init__(
            model,
            optimizer,
            drop=Magnitude(),
            grow=Gradient(None),
            fraction=decay(fraction, until),
            every=every,
            until=until,
            seed=seed,
        )
        self._budgets = {pool.name: pool.weight.connections for pool in self.pools}
        with torch.no_grad():
            for pool in self._trained():
                self._even_out(pool)

    def _even_out(self, pool: Pool) -> None:
        weight = pool.weight
        fan_in = weight.fan_in()
        if fan_in[fan_in > 0].unique().numel() <= 1:
            return
        n_rows, n_cols = weight.matrix_shape
        k = max(1, weight.connections // n_rows)
        live = torch.zeros_like(fan_in, dtype=torch.bool)
        live[torch.sort(-fan_in, stable=True).indices[: weight.connections]] = True
        slots = weight.active()
        gone = slots[~largest_in_rows(pool, slots, torch.ones_like(slots, dtype=torch.bool), live, k)]
        need = (live * (k - fan_in)).clamp(min=0)
        dormant_before = torch.arange(n_rows, device=need.device) * n_cols - weight.index.row_ptr[:-1].long()
        stream, ranks = pool.stream(Purpose.GROW), []
        for row in need.nonzero().flatten().tolist():
            free = n_cols - int(fan_in[row].item())
            drawn = random.distinct(int(need[row].item()), free, self.seed, 0, stream, offset=row << 32)
            ranks.append(drawn.to(need.device) + dormant_before[row])
        rank = torch.cat(ranks) if ranks else need[:0]
        none = rank[:0]
        rows, cols = topology.candidates(weight.index, n_rows, n_cols, rank, none, none)
        values = weight.values[gone][: rank.numel()].clone()
        self._exchange(pool, gone, rows, cols, values)
        self._dropped[pool.name] = self._grown[pool.name] = 0  # this is where training starts

    def _exchange_all(self, pools: list[Pool], fraction: float, time: int) -> None:
        for pool in pools:
            if pool.weight.connections < pool.weight.size:  # a full pool could only grow what it dropped
                self._restructure(pool, fraction)

    def _restructure(self, pool: Pool, fraction: float) -> None:
        weight = pool.weight
        n_rows, n_cols = weight.matrix_shape
        fan_in = weight.fan_in()
        dropped = self.drop(pool, fraction)
        scores = Gradients(pool)
        grown, _, _ = top(scores.block, pool, dropped, dropped.numel(), at=scores.at, absolute=True)
        lost = weight.rows[dropped].long()
        salient = fan_in - torch.bincount(lost, minlength=n_rows) + torch.bincount(grown, minlength=n_rows)
        bar = max(1.0, self.gamma * float(fan_in.max().item()))
        live = salient >= bar
        if not live.any():
            live[salient.argmax()] = True
        budget = self._budgets[pool.name]
        if int(live.sum()) > budget:
            live = torch.zeros_like(live)
            live[torch.sort(-salient, stable=True).indices[:budget]] = True
        k = min(n_cols, budget // int(live.sum().item()))
        slots = weight.active()
        survives = torch.ones(weight.capacity, dtype=torch.bool, device=weight.device)
        survives[dropped] = False
        keep = largest_in_rows(pool, slots, survives[slots], live, k)
        kept = slots[keep]
        need = live * k - torch.bincount(weight.rows[kept].long(), minlength=n_rows)
        rows, cols = self._best_in_rows(pool, kept, need)
        gone = slots[~keep]
        self._exchange(pool, gone, rows, cols)

    def _best_in_rows(self, pool: Pool, kept: Tensor, need: Tensor) -> tuple[Tensor, Tensor]:
        """The ``need[r]`` positions of largest gradient magnitude in each row r that are not ``kept`` (slots)."""
        weight, block = pool.weight, gradient_block(pool)
        n_rows, n_cols = weight.matrix_shape
        row, col = weight.rows[kept].long(), weight.cols[kept].long()
        found_rows, found_cols = [row[:0]], [row[:0]]
        tile = max(1, TILE_ELEMENTS // n_cols)
        for start in range(0, n_rows, tile):
            stop = min(start + tile, n_rows)
            wanted = need[start:stop]
            most = int(wanted.max().item())
            scores = torch.nan_to_num(block(start, stop).abs_(), nan=0.0)  # a collective under DDP: for every tile
            if not most:
                continue
            inside = (row >= start) & (row < stop)
            scores[row[inside] - start, col[inside]] = -1.0
            best = scores.topk(most, 1).indices
            taken = torch.arange(most, device=best.device) < wanted[:, None]
            found_rows.append(taken.nonzero()[:, 0] + start)
            found_cols.append(best[taken])
        return torch.cat(found_rows), torch.cat(found_cols)

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"gamma": self.gamma}

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"budgets": dict(self._budgets)}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        budgets = {name: int(state["budgets"][name]) for name in self._budgets}
        super()._load_state(state)
        self._budgets = budgets


def largest_in_rows(pool: Pool, slots: Tensor, eligible: Tensor, live: Tensor, k: int) -> Tensor:
    """Which of ``slots`` are ``eligible``, in a ``live`` row and among its k largest magnitudes (ties: the first)."""
    rows = pool.weight.rows[slots].long()
    score = torch.where(eligible, pool.weight.values[slots].abs(), -1.0)
    order = torch.sort(-score, stable=True).indices
    order = order[torch.sort(rows[order], stable=True).indices]
    count = torch.bincount(rows, minlength=live.numel())
    before = count.cumsum(0) - count
    rank = torch.empty_like(rows)
    rank[order] = torch.arange(rows.numel(), device=rows.device) - before[rows[order]]
    return eligible & live[rows] & (rank < k)

"""SRigL: structured RigL, a constant fan-in for every neuron."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewire import topology
from rewire.methods.core.base import Pool, Purpose
from rewire.methods.core.parameters import Share, setting
from rewire.methods.core.registry import register
from rewire.methods.criteria.gradients import best_candidates, probed
from rewire.methods.criteria.topk import TILE_ELEMENTS, Gradients, top
from rewire.methods.dynamic.rigl import ByGradients

__all__ = ["SRigL"]


@register(
    name="srigl",
    paper="Lasby et al., ICLR 2024 (arXiv 2305.02299)",
    summary="RigL with the same fan-in for every neuron, and neurons without salient weights "
    "taken out",
    keeps_budget="at most",
    guarantees=(
        "every live neuron of a layer has the same fan-in at every moment",
        "never more than K in a layer",
    ),
    needs="gradients",
)
class SRigL(ByGradients):
    """Every ``every`` steps until T_end, in each layer with fan-in k::

        n        floor(f K),  f(t) as RigL's
        salient  all but the n smallest |w|, and the n largest |dL/dw| among the other positions
        ablate   neurons with fewer than max(1, gamma k) salient positions; at least one stays
        k        floor(K / neurons left), at most the number of inputs
        drop     what is not salient, and the smallest |w| of neurons that have more than k left
        grow     in each neuron the largest |dL/dw| until it has k

    A neuron is a row of the weight (an output, an output channel, a gate's unit). An ablated one
    has no connections and may come back when enough of its gradients are among the n largest.
    Making the method evens out the layers: neurons with more than floor(K / neurons) connections
    lose the smallest, the others get random ones with the values of those lost. At most neurons - 1
    connections of K stay unused, from rounding.

    With sampled candidates, what is dropped is looked at besides them. A neuron that has too few of
    them grows uniformly random connections for the rest. Where they are fewer than n, random
    positions count among the n largest, so fewer neurons are ablated.

    That ablated neurons may return is recalled, not read. Cost: exact O(M samples) time per update
    and O(K) memory besides the step's activations; sampled O(K samples), and O(K log K) to rank.
    """

    gamma: Share = setting(
        default=0.3,
        help="share of the fan-in that must be salient; 0 turns ablation off (but for neurons with "
        "nothing salient)",
    )

    # Within allowed positions a neuron may have too few, and an ablated one drops all it has.
    keeps_prior = False
    saves = ("_budgets",)

    def _setup(self) -> None:
        super()._setup()
        self._budgets = {pool.name: pool.weight.connections for pool in self.pools}
        with torch.no_grad():
            for pool in self._trained():
                self._even_out(pool)

    def _even_out(self, pool: Pool) -> None:
        weight = pool.weight
        fan_in = weight.fan_in()
        if fan_in[fan_in > 0].unique().numel() <= 1:
            return
        k = max(1, weight.connections // weight.matrix_shape[0])
        live = torch.zeros_like(fan_in, dtype=torch.bool)
        live[torch.sort(-fan_in, stable=True).indices[: weight.connections]] = True
        slots, quota = weight.active(), live * k
        active, magnitudes = weight.rows[slots].long(), weight.values[slots].abs()
        gone = slots[~largest_in_rows(active, magnitudes, quota)]
        need = (quota - fan_in).clamp(min=0)
        rows, cols = topology.sample_in_rows(
            active,
            weight.cols[slots].long(),
            *weight.matrix_shape,
            need,
            self.seed,
            0,
            pool.stream(Purpose.GROW),
        )
        values = weight.values[gone][: rows.numel()].clone()
        self._exchange(pool, gone, rows, cols, values)
        self._dropped[pool.name] = self._grown[pool.name] = 0  # this is where training starts

    def _exchange_all(self, pools: list[Pool], fraction: float, time: int) -> None:
        for pool in pools:
            # a full pool could only grow what it dropped
            if pool.weight.connections < pool.weight.size:
                self._restructure(pool, fraction, time)

    def _restructure(self, pool: Pool, fraction: float, time: int) -> None:
        weight = pool.weight
        n_rows, n_cols = weight.matrix_shape
        fan_in = weight.fan_in()
        dropped = self.drop(pool, fraction)
        growth = _Exact(pool) if weight.candidates is None else _Sampled(pool, self.seed, time)
        grown = growth.strongest(dropped)
        lost = weight.rows[dropped].long()
        salient = (
            fan_in
            - torch.bincount(lost, minlength=n_rows)
            + torch.bincount(grown, minlength=n_rows)
        )
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
        magnitudes = torch.where(survives[slots], weight.values[slots].abs(), -1.0)
        keep = largest_in_rows(weight.rows[slots].long(), magnitudes, live * k)
        kept, gone = slots[keep], slots[~keep]
        need = live * k - torch.bincount(weight.rows[kept].long(), minlength=n_rows)
        self._exchange(pool, gone, *growth.in_rows(kept, gone, need))

    def finalize(self) -> nn.Module:
        """As `Method.finalize`; what rounding left unused of the budget gives its storage back (not
        under DDP).
        """
        if self._attachment.attached:
            for pool in self.pools:
                self._give_back(pool, self._budgets[pool.name] - pool.weight.connections)
        return super().finalize()


class _Exact:
    """Growth by the gradients of all positions, in tiles of rows."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self._scores = pool, Gradients(pool)

    def strongest(self, dropped: Tensor) -> Tensor:
        """The rows of as many positions as are dropped, those of largest gradient magnitude that
        are not kept.
        """
        return top(
            self._scores.block,
            self._pool,
            dropped,
            dropped.numel(),
            at=self._scores.at,
            absolute=True,
        )[0]

    def in_rows(self, kept: Tensor, gone: Tensor, need: Tensor) -> tuple[Tensor, Tensor]:
        """The ``need[r]`` positions of largest gradient magnitude in each row r that are not
        ``kept`` (slots).
        """
        weight, block = self._pool.weight, self._scores.block
        n_rows, n_cols = weight.matrix_shape
        row, col = weight.rows[kept].long(), weight.cols[kept].long()
        found_rows, found_cols = [row[:0]], [row[:0]]
        tile = max(1, TILE_ELEMENTS // n_cols)
        for start in range(0, n_rows, tile):
            stop = min(start + tile, n_rows)
            wanted = need[start:stop]
            most = int(wanted.max().item())
            # a collective under DDP: for every tile
            scores = torch.nan_to_num(block(start, stop).abs_(), nan=0.0)
            if not most:
                continue
            inside = (row >= start) & (row < stop)
            scores[row[inside] - start, col[inside]] = -1.0
            best = scores.topk(most, 1).indices
            taken = torch.arange(most, device=best.device) < wanted[:, None]
            found_rows.append(taken.nonzero()[:, 0] + start)
            found_cols.append(best[taken])
        return torch.cat(found_rows), torch.cat(found_cols)


class _Sampled:
    """Growth by the gradients of candidates and of what is dropped, of all of which there are
    O(K).
    """

    def __init__(self, pool: Pool, seed: int, step: int) -> None:
        assert pool.weight.candidates is not None
        self._pool, self._seed, self._step = pool, seed, step
        self._own, self._new = probed(pool)

    def strongest(self, dropped: Tensor) -> Tensor:
        """As `_Exact.strongest`."""
        scores = torch.cat([self._own[dropped], self._new])
        return best_candidates(
            self._pool, dropped, scores, dropped.numel(), self._seed, self._step
        )[0]

    def in_rows(self, kept: Tensor, gone: Tensor, need: Tensor) -> tuple[Tensor, Tensor]:
        """As `_Exact.in_rows`; random ones where a row has too few candidates. ``gone``: the slots
        not kept.
        """
        weight, drawn = self._pool.weight, self._pool.weight.candidates
        assert drawn is not None
        rows = torch.cat([weight.rows[gone].long(), drawn.rows])
        cols = torch.cat([weight.cols[gone].long(), drawn.cols])
        chosen = largest_in_rows(rows, torch.cat([self._own[gone], self._new]).abs(), need)
        rows, cols = rows[chosen], cols[chosen]
        n_rows, n_cols = weight.matrix_shape
        rest = need - torch.bincount(rows, minlength=n_rows)
        taken = (
            torch.cat([weight.rows[kept].long(), rows]),
            torch.cat([weight.cols[kept].long(), cols]),
        )
        stream = self._pool.stream(Purpose.REDRAW)  # `strongest` may have drawn from GROW
        more = topology.sample_in_rows(*taken, n_rows, n_cols, rest, self._seed, self._step, stream)
        return torch.cat([rows, more[0]]), torch.cat([cols, more[1]])


def largest_in_rows(rows: Tensor, scores: Tensor, quota: Tensor) -> Tensor:
    """Which entries are among the ``quota[row]`` largest of their row (ties: the first); never one
    of score below 0.
    """
    scores = torch.nan_to_num(scores, nan=0.0)
    order = torch.sort(-scores, stable=True).indices
    order = order[torch.sort(rows[order], stable=True).indices]
    count = torch.bincount(rows, minlength=quota.numel())
    before = count.cumsum(0) - count
    rank = torch.empty_like(rows)
    rank[order] = torch.arange(rows.numel(), device=rows.device) - before[rows[order]]
    return (scores >= 0) & (rank < quota[rows])

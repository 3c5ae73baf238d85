"""Cosine similarity of the activations at the two ends of a connection, for connections there are
and could be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewire.distributed import sum_over_ranks
from rewire.methods.core.base import Data, Pool
from rewire.methods.criteria.activations import Recorder
from rewire.nn import SparseWeight
from rewire.ops.pairs import Pair
from rewire.topology import Index

__all__ = ["Cosines", "Similarity"]


class Cosines:
    """Absolute cosines of one weight: ``abs(sum of x[c] y[r]) / (norm of x[c] norm of y[r])``, not
    mean-centred.

    pairs: (source, target) of the calls of its layer; sums run over all of them, and over the ranks
        that share ``weight``, each of which may have data of its own. The cosine with a column or
        row of zeros is 0, as in scikit-learn. Of a convolution, x[c] is the column of the unfolded
        input.

    Cost: O(samples) per cosine, O(samples x features) memory once.
    """

    def __init__(self, pairs: Sequence[Pair], weight: SparseWeight) -> None:
        self.weight, self.rows = weight, pairs[0].matrix_shape[0]
        by_row = _inverse(self._total([pair.row_norms() for pair in pairs]))
        by_col = _inverse(self._total([pair.col_norms() for pair in pairs]))
        # Norms go into the sides where they can, so that a tile is a product and nothing else.
        self._by_col = None if all(pair.geometry is None for pair in pairs) else by_col
        self.pairs = [self._scaled(pair, by_row, by_col) for pair in pairs]

    @staticmethod
    def _scaled(pair: Pair, by_row: Tensor, by_col: Tensor) -> Pair:
        x = pair.x.to(by_row.dtype) * by_col[0] if pair.geometry is None else pair.x
        return Pair(
            x, pair.g.to(by_row.dtype) * by_row.view(-1, *(1,) * (pair.g.dim() - 2)), pair.geometry
        )

    def block(self, start: int, stop: int) -> Tensor:
        """Of all columns of the rows from start to stop: (stop - start, cols)."""
        return self.signed_block(start, stop).abs_()

    def signed_block(self, start: int, stop: int) -> Tensor:
        """As `block`, with the sign that the cosine has."""
        out = self._total([pair.block(start, stop) for pair in self.pairs])
        if self._by_col is not None:
            out *= self._by_col[self._group(torch.arange(start, stop, device=out.device))]
        return out

    def at(self, index: Index, capacity: int, rows: Tensor, cols: Tensor) -> Tensor:
        """Of the positions that ``index`` lists: (capacity,), by slot; ``rows``, ``cols`` are the
        slots' positions.

        0 in empty slots.
        """
        out = self._total([pair.at(index, capacity) for pair in self.pairs])
        if self._by_col is not None:
            out *= self._by_col[self._group(rows.long().clamp(min=0)), cols.long().clamp(min=0)]
        return out.abs_()

    def _total(self, parts: Sequence[Tensor]) -> Tensor:
        out = parts[0]
        for part in parts[1:]:
            out = out + part
        return sum_over_ranks(self.weight, out)

    def _group(self, rows: Tensor) -> Tensor:
        assert self._by_col is not None
        return rows // (self.rows // self._by_col.shape[0])


def _inverse(squares: Tensor) -> Tensor:
    return torch.where(squares > 0, squares.rsqrt(), torch.zeros_like(squares))


class Similarity:
    """The similarities that criteria ask for during one update, all of the model as it was before.

    Give one object to both criteria of a `rewire.methods.Rewirer`
    (``ByMagnitudeAndSign(similarity)``, ``BySimilarity(similarity)``), which has it record at the
    start of an update and forget at its end.

    Args:
        model, data, samples, mode, activations, centred: see
            `rewire.methods.criteria.activations.Recorder`.
        output_layer: whether the output layer has similarities too; if not, criteria do as SET does
            there.
    """

    def __init__(
        self, model: nn.Module, data: Data, *, output_layer: bool = False, **looking: Any
    ) -> None:
        self.recorder = Recorder(model, data, **looking)
        self.output_layer = output_layer
        self._cosines: dict[int, Cosines] = {}

    def record(self, pools: Sequence[Pool], seed: int, step: int) -> None:
        """Look at the activations of the model as it is now."""
        pairs, output = self.recorder.record(pools, seed, step)
        if not self.output_layer and output is not None:
            pairs.pop(output, None)
        weights = {pool.number: pool.weight for pool in pools}
        self._cosines = {
            number: Cosines(pairs[number], weights[number]) for number in sorted(pairs)
        }

    def forget(self) -> None:
        """Give the memory back."""
        self._cosines = {}

    def of(self, pool: Pool) -> Cosines | None:
        """The cosines of a pool; None if it has none: an excluded output layer, or a layer that did
        not run.
        """
        return self._cosines.get(pool.number)

    def active(self, pool: Pool) -> Tensor | None:
        """Of the pool's connections: (capacity,), by slot, or None. O(K samples) time."""
        cosine, weight = self.of(pool), pool.weight
        if cosine is None:
            return None
        return cosine.at(weight.index, weight.capacity, weight.rows, weight.cols)

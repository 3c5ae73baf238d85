"""What can be computed from a captured call of a layer: sums over samples of products of its sides.

Backward appends one `Pair` per call of a layer to ``SparseWeight.capture``. Under
``create_graph=True``, the products within the first backward pass append theirs in the second one,
so that the sums are complete gradients.

With ``g`` the gradient of the output, the sums are the gradients of all positions of the weight,
active or dormant; with ``g`` the output itself, they are the numerators of cosine similarities.
Nothing here allocates rows x cols numbers, except the block that a caller asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rewire.ops.conv_kernels import conv_value_gradient
from rewire.ops.geometry import Geometry, planes
from rewire.ops.kernels import sddmm
from rewire.topology import Index

__all__ = ["Capture", "Exchanged", "Pair", "exchanged"]

#: Elements of the largest temporary: an unfolded piece of a convolution's input.
_UNFOLDED_ELEMENTS = 1 << 21


#: Multiply-adds from which oneDNN is worth its call.
_LARGE = 1 << 22


def _wide(x: Tensor) -> Tensor:
    """``x`` in float64 if it is, else in float32, for sums."""
    return x if x.dtype == torch.float64 else x.float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``. For wide results of short sums oneDNN takes half the time of `torch.mm` (MKL)."""
    large = a.shape[0] * a.shape[1] * b.shape[1] >= _LARGE
    if large and a.is_cpu and a.dtype == b.dtype == torch.float32 and _has_onednn():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return result
    return a @ b


def _has_onednn() -> bool:
    mkldnn = torch.backends.mkldnn
    return (
        mkldnn.is_available()
        and bool(mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@dataclass(frozen=True, eq=False)
class Pair:
    """The input of one call of a layer, and its output or the gradient of it.

    x, g: of a product, (batch, cols) and (batch, rows) in any strides; of a convolution (with
        ``geometry``), the input (batch, channels, d1, ...), which ``geometry`` pads, and (batch,
        rows, output d1, ...). Detached.

    As a matrix the weight is rows by cols. In a convolution with groups, row r belongs to group ``r
    // (rows / groups)``, and a column stands for another input in each group.
    """

    x: Tensor
    g: Tensor
    geometry: Geometry | None = None

    @property
    def groups(self) -> int:
        """Groups of the convolution; 1 for a product."""
        return 1 if self.geometry is None else self.geometry.groups

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, cols) of the weight."""
        if self.geometry is None:
            return self.g.shape[1], self.x.shape[1]
        return self.g.shape[1], self.x.shape[1] // self.groups * math.prod(self.geometry.kernel)

    def block(self, start: int, stop: int) -> Tensor:
        """``out[r - start, c] = sum over samples and positions of g[r] * x[c]`` for the rows from
        start to stop.

        The result is (stop - start, cols), float64 if the pair is, else float32. Computed as one
        dense product; for convolutions, over the unfolded input in pieces. O((stop - start) cols
        samples positions) time, O(result + pieces of 8 MiB) memory.
        """
        if self.geometry is None:
            return _product(_wide(self.g[:, start:stop]).t(), _wide(self.x))
        rows, cols = self.matrix_shape
        per_group = rows // self.groups
        out = torch.zeros(stop - start, cols, dtype=_wide(self.g[:0]).dtype, device=self.g.device)
        for group in range(start // per_group, -(-stop // per_group)):
            low, high = max(start, group * per_group), min(stop, (group + 1) * per_group)
            for samples, first, last, piece in self._unfolded(group):
                g = _wide(self.g[samples, low:high]).movedim(0, -1).flatten(1)
                out[low - start : high - start, first:last].addmm_(g, piece.t())
        return out

    def _unfolded(self, group: int) -> Iterator[tuple[slice, int, int, Tensor]]:
        """The input of a group in pieces: which samples, first and last column, and the piece
        (columns, output positions x samples).
        """
        geometry = self.geometry
        assert geometry is not None
        kk, per_group = math.prod(geometry.kernel), self.x.shape[1] // geometry.groups
        each = kk * max(math.prod(self.g.shape[2:]), 1)  # elements of one channel of one sample
        batch = max(1, min(self.x.shape[0], _UNFOLDED_ELEMENTS // (each * per_group)))
        channels = max(1, min(per_group, _UNFOLDED_ELEMENTS // (each * batch)))
        if not self.g[0, 0].numel():
            return
        for sample in range(0, self.x.shape[0], batch):
            samples = slice(sample, sample + batch)
            for channel in range(0, per_group, channels):
                from_, to = channel, min(channel + channels, per_group)
                x = _wide(self.x[samples, group * per_group + from_ : group * per_group + to])
                piece = planes(x, geometry).reshape((to - from_) * kk, -1)
                yield samples, from_ * kk, to * kk, piece

    def at(self, index: Index, capacity: int) -> Tensor:
        """The same sums at the positions of ``index`` only: (capacity,), by slot; 0 in slots that
        it does not list.

        O(positions of index x samples) time, O(capacity) memory. Raises RuntimeError on a bad
        index.
        """
        lists = index.by_row
        g, x = _wide(self.g), _wide(self.x)
        if self.geometry is None:
            return sddmm(*lists, capacity, g, x)
        return conv_value_gradient(lists, capacity, g, x, self.geometry)

    def row_norms(self) -> Tensor:
        """``sum of g[r]^2`` over samples and positions: (rows,)."""
        return _wide(self.g).square().sum((0, *range(2, self.g.dim())))

    def col_norms(self) -> Tensor:
        """``sum of x[c]^2`` over samples and (for a convolution, unfolded) positions: (groups,
        cols).
        """
        squares = _wide(self.x).square()
        if self.geometry is None:
            return squares.sum(0, keepdim=True)
        each = planes(squares, self.geometry)
        at = range(1 + len(self.geometry.kernel), each.dim())
        return each.sum(tuple(at)).reshape(self.groups, -1)


class Capture(Protocol):
    """What `SparseWeight.capture` is while a step is captured: a list of pairs, or anything with
    ``append``.
    """

    def append(self, pair: Pair, /) -> None:
        """Take one call of the layer, in backward."""


class Exchanged:
    """A capture for products with the transposed weight: it exchanges the sides of their pairs and
    hands them on.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def append(self, pair: Pair, /) -> None:
        """As `Capture.append`."""
        self.capture.append(Pair(pair.g, pair.x, pair.geometry))


def exchanged(capture: Capture | None) -> Capture | None:
    """``capture`` for the transposed weight, whose transpose is the weight again."""
    if isinstance(capture, Exchanged):
        return capture.capture
    return None if capture is None else Exchanged(capture)

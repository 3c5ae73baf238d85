"""Rounds the values of a sparse weight to int8 or to three numbers, with a scale for each row."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = ["Rounded", "Values", "check", "deviation", "rounded", "to_int8", "to_ternary"]

#: How a frozen weight keeps its values.
Values = Literal["float", "int8", "ternary"]

#: The largest magnitude of an int8 value; -128 is not used, so that codes are symmetric.
_LARGEST = 127


class Rounded(NamedTuple):
    """Codes of the connections, -127 to 127 (int8) or -1, 0 and 1, and the scale of each row. A
    value is code x scale.
    """

    codes: Tensor
    scale: Tensor


def to_int8(rows: Tensor, values: Tensor, count: int) -> Rounded:
    """The nearest multiples of 1/127 of the largest magnitude of a row.

    ``rows`` (int64) and ``values`` have an entry for each connection; ``count`` is the number of
    rows. O(K).
    """
    largest = values.new_zeros(count).scatter_reduce_(0, rows, values.abs(), "amax")
    scale = torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))
    codes = (values / scale[rows]).round_().clamp_(-_LARGEST, _LARGEST)
    return Rounded(codes.to(torch.int8), scale)


def to_ternary(rows: Tensor, values: Tensor, count: int) -> Rounded:
    """Minus a scale, 0 or plus the scale, the nearest there are to the values of each row in the
    sum of squares.

    Keeping the n largest magnitudes at their mean leaves an error of sum w^2 - (sum of the n)^2 / n
    (Li et al. 2016, arXiv 1605.04711, whose threshold approximates the best n), so the best n is
    the one with the largest quotient. Values that are plus and minus one number stay as they are.
    O(K log K).
    """
    sizes = values.abs().double()
    order = torch.argsort(sizes, descending=True, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    row, sizes = rows[order], sizes[order]
    starts = torch.searchsorted(row, torch.arange(count, device=row.device))
    place = torch.arange(row.numel(), device=row.device) - starts[row] + 1
    sums = sizes.cumsum(0)
    sums = sums - (sums - sizes)[starts[row]] if row.numel() else sums
    gain = sums.square() / place
    best = gain.new_zeros(count).scatter_reduce_(0, row, gain, "amax")
    # Equal gains differ in rounding only; the largest n keeps what was ternary whole.
    near = gain >= best[row] * (1 - 1e-12)
    kept = place.new_zeros(count).scatter_reduce_(0, row, place * near, "amax")
    last = place == kept[row]
    scale = torch.zeros(count, dtype=torch.float64, device=row.device)
    scale[row[last]] = (sums / place)[last]
    codes = torch.zeros_like(values)
    codes[order] = torch.where(place <= kept[row], values[order].sign(), 0)
    return Rounded(codes.to(torch.int8), scale.to(values.dtype))


def check(values: str) -> None:
    """Raise ValueError for what is not one of `Values`."""
    allowed = get_args(Values)
    if values not in allowed:
        raise ValueError(f"values must be {', '.join(map(repr, allowed))}, not {values!r}")


def rounded(kind: Values, rows: Tensor, values: Tensor, count: int) -> Rounded:
    """`to_int8` or `to_ternary`."""
    return (to_int8 if kind == "int8" else to_ternary)(rows, values, count)


def deviation(rows: Tensor, exact: Tensor, kept: Tensor, count: int) -> tuple[float, float]:
    """The relative error of the values, the root of sum (w - w')^2 / sum w^2, and the largest sum
    of abs(w - w') over one of ``count`` rows; both 0 without connections.
    """
    off = (exact.double() - kept.double()).abs()
    size = exact.double().norm()
    sums = off.new_zeros(count).index_add_(0, rows, off)
    error = float(off.norm() / size) if size > 0 else 0.0
    return error, float(sums.max()) if sums.numel() else 0.0

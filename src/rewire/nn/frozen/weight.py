"""`FrozenWeight`: a sparse weight for inference, without slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rewire.nn.frozen import quantize
from rewire.nn.frozen.quantize import Values
from rewire.nn.weight.pool import SparseWeight
from rewire.nn.weight.shape import Shaped
from rewire.ops import NARROW, frozen_linear
from rewire.ops.frozen import NATIVE_PRODUCT, FrozenLists

__all__ = ["FrozenWeight", "Values", "frozen_weights"]

#: Columns up to here are kept in 16 bits.
_NARROW_COLUMNS = 1 << 16


class FrozenWeight(Shaped):
    """The connections of a sparse weight in (row, column) order, as buffers; `rewire.freeze` makes
    them.

    Attributes:
        ptr, cols, values, scale: see `rewire.ops.frozen`.
        stored: "float", "int8" or "ternary", what the values are kept as.
        error: the relative error of the values, the root of sum (w - w')^2 / sum w^2; 0 for
            "float".
        bound: the largest sum of abs(w - w') over a row: outputs are off by at most this times the
            largest magnitude among the inputs.

    It keeps 6 bytes for each connection ("float", float32), 3 ("int8") or 2 ("ternary"), 2 more
    where there are over 65,536 columns, and 4 to 8 for each row. Zeros that rounding to "ternary"
    makes are left out.
    """

    ptr: Tensor
    cols: Tensor
    values: Tensor | None
    scale: Tensor | None

    @torch.no_grad()
    def __init__(self, weight: SparseWeight, values: Values = "float") -> None:
        super().__init__()
        quantize.check(values)
        self._shape, self.stored = weight.shape, values
        self.error = self.bound = 0.0
        rows, cols, numbers = (t.detach() for t in weight.coo())
        count, columns = self.matrix_shape
        scale: Tensor | None = None
        kept: Tensor | None = numbers.clone()
        parts, at = rows, count
        if values != "float":
            if not numbers.isfinite().all():
                raise ValueError(f"values that are not finite cannot be stored as {values}")
            kept, scale = quantize.rounded(values, rows, numbers, count)
            stored = kept.to(scale.dtype) * scale[rows]
            self.error, self.bound = quantize.deviation(rows, numbers, stored, count)
            parts = rows
        if values == "ternary":
            assert kept is not None
            there = kept != 0
            # Of each row first what is added, then what is subtracted.
            parts, cols, at = (2 * rows + (kept < 0))[there], cols[there], 2 * count
            order = torch.argsort(parts, stable=True)
            parts, cols, kept = parts[order], cols[order], None
        ptr = torch.zeros(at + 1, dtype=torch.int64, device=rows.device)
        ptr[1:] = torch.bincount(parts, minlength=at).cumsum(0)
        small = cols.numel() < 2**31
        self.register_buffer("ptr", ptr.to(torch.int32) if small else ptr)
        narrow = torch.uint16 if columns <= _NARROW_COLUMNS else torch.int32
        self.register_buffer("cols", cols.to(narrow if columns <= 2**31 else torch.int64))
        self.register_buffer("values", kept)
        self.register_buffer("scale", scale)
        # What `quick` compares the input with; no input has a negative number of columns.
        fits = numbers.dtype == torch.float32 and columns <= 2**31
        self._quick_columns = columns if fits else -1

    # --- what it is -------------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """K, the number of connections."""
        return self.cols.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the values that products see."""
        numbers = self.values if self.scale is None else self.scale
        assert numbers is not None
        return numbers.dtype

    @property
    def device(self) -> torch.device:
        """Of all its tensors."""
        return self.cols.device

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def lists(self) -> FrozenLists:
        """Its connections, as products take them."""
        b: dict[str, Any] = self._buffers  # faster than attributes of a module
        return FrozenLists(b["ptr"], b["cols"], b["values"], b["scale"])

    def coo(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns (int64) and values (floats) of the connections, sorted by row."""
        lists = self.lists().expand()
        count = self.matrix_shape[0]
        rows = torch.arange(count, device=self.device).repeat_interleave(lists.ptr.diff())
        return rows, lists.idx.long(), lists.values

    def to_dense(self) -> Tensor:
        """The dense tensor of ``shape``, 0 where there is no connection."""
        rows, cols, values = self.coo()
        dense = torch.zeros(self.matrix_shape, dtype=values.dtype, device=values.device)
        return dense.index_put((rows, cols), values).reshape(self._shape)

    def extra_repr(self) -> str:
        return (
            f"{tuple(self._shape)}, connections={self.connections}, density={self.density:.4g}, "
            f"values={self.stored}"
        )

    # --- products ---------------------------------------------------------------------------------

    def quick(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """`product` for the usual case, where checks would take longer than a small product; None
        for any other case.
        """
        if (
            NATIVE_PRODUCT is None
            or x.dtype is not torch.float32
            or x.dim() != 2
            or x.shape[1] != self._quick_columns
            or x.requires_grad
            or not x.is_cpu
        ):
            return None
        b: dict[str, Any] = self._buffers
        return NATIVE_PRODUCT(b["ptr"], b["cols"], b["values"], b["scale"], x, bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + bias``, (..., columns) -> (..., rows), row-major.

        x has the dtype of the weight; or 16 bits, and the weight is float32: then sums are float32
        and the result has 16 bits. Raises RuntimeError for dtypes and shapes that do not fit, and
        where x needs a gradient.
        """
        y = self.quick(x, bias)
        if y is not None:
            return y
        check_no_gradient(x)
        kind, columns = self.dtype, self.matrix_shape[1]
        narrow = x.dtype in NARROW and kind == torch.float32
        if x.dtype != kind and not narrow:
            raise RuntimeError(
                f"x is {x.dtype} but the frozen weight is {kind}: convert one, so that both agree"
            )
        if not x.dim() or x.shape[-1] != columns:
            raise RuntimeError(
                f"x has shape {tuple(x.shape)}, but the layer takes (..., {columns})"
            )
        flat = x.unsqueeze(0) if x.dim() == 1 else x if x.dim() == 2 else x.flatten(0, -2)
        y = frozen_linear(self.lists(), flat.float() if narrow else flat, bias)
        y = y.to(x.dtype) if narrow else y
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.matrix_shape[0])


def check_no_gradient(x: Tensor) -> None:
    """Raise RuntimeError if a gradient is expected for ``x``."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "a frozen layer has no gradients, and its input needs one: call the model under "
            "torch.no_grad(), or use the model it was frozen from"
        )


def frozen_weights(model: nn.Module) -> Iterator[tuple[str, FrozenWeight]]:
    """Every frozen weight of ``model`` once, with its (first) name, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenWeight):
            yield name, module

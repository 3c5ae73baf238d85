"""Samples that are not kept as float32: bytes, and rows of sparse matrices.

All behave like a float32 tensor (samples, features) as far as training needs: they have a length
and a shape, and indexing them with a slice or a tensor of numbers gives such a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["ByteRows", "Rows", "SparseRows", "select"]

Index = slice | Tensor


class ByteRows:
    """Rows of bytes, ``(value - shift) * scale`` when they are read: a quarter of the memory.

    Args:
        values: uint8 (samples, features).
        shift, scale: float32 scalars or (features,).
    """

    def __init__(self, values: Tensor, shift: Tensor, scale: Tensor) -> None:
        self.values, self.shift, self.scale = values, shift, scale
        self.shape = values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Index) -> Tensor:
        return self.values[index].to(torch.float32).sub_(self.shift).mul_(self.scale)

    def select(self, index: Tensor) -> ByteRows:
        """Some of the rows, as bytes."""
        return ByteRows(self.values[index], self.shift, self.scale)


class SparseRows:
    """Rows of a sparse matrix; only those that are read become dense.

    Args:
        matrix: a matrix of SciPy, (samples, features).
    """

    def __init__(self, matrix: Any) -> None:
        from scipy import sparse

        self.matrix = sparse.csr_array(matrix, dtype="float32")
        self.shape = torch.Size(self.matrix.shape)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: Index) -> Tensor:
        chosen = index if isinstance(index, slice) else index.numpy()
        return torch.from_numpy(self.matrix[chosen].toarray())

    def select(self, index: Tensor) -> SparseRows:
        """Some of the rows, sparse."""
        return SparseRows(self.matrix[index.numpy()])


Rows = Tensor | ByteRows | SparseRows


def select(rows: Rows, index: Tensor) -> Rows:
    """Some of the rows, kept as they are."""
    return rows[index] if isinstance(rows, Tensor) else rows.select(index)

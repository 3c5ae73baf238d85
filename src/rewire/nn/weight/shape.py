"""What a sparse weight says about the dense one it stands for, with or without slots."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

__all__ = ["Shaped"]


class Shaped(nn.Module):
    """A module with the connections of a weight of ``_shape``; subclasses count ``connections``."""

    _shape: torch.Size

    @property
    def connections(self) -> int:
        """K, the number of connections."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense weight this stands for."""
        return self._shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, cols) of the weight as a matrix."""
        return self._shape[0], math.prod(self._shape[1:])

    @property
    def size(self) -> int:
        """M, the number of potential connections."""
        return math.prod(self._shape)

    @property
    def density(self) -> float:
        """K / M."""
        return self.connections / self.size

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # PyTorch's Transformer layers look for this method, and then do not give the weight to
        # fused kernels for dense tensors.
        raise TypeError(
            f"{cls.__name__} is not a tensor: use its layer, or to_dense(), for {function.__name__}"
        )

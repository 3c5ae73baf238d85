"""`Absent`: takes the place of a module that was switched off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Absent"]


class Absent(nn.Module):
    """Takes the place of a module whose output is always 0: returns a 0-dim zero, which can be
    added to anything.

    It has no parameters. Dtype and device are those of its first tensor argument.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """A zero of shape ()."""
        like = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        return torch.zeros(()) if like is None else like.new_zeros(())

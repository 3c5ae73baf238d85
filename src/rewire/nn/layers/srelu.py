"""`SReLU`: a learned, S-shaped activation for every unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["SReLU"]


class SReLU(nn.Module):
    """S-shaped rectified linear unit (Jin et al., AAAI 2016, arXiv 1512.07030), which SET's authors
    use.

    With four numbers learned for every unit, and t_r = t_l + abs(t_right)::

        t_l + a_l (x - t_l)    for x <= t_l
        x                      between
        t_r + a_r (x - t_r)    for x >= t_r

    Args:
        shape: of one sample: a number of features, or (channels, height, width) and the like.
        generator: draws the initial values; torch's default generator otherwise.

    Shapes: (..., *shape) in and out, with the input's memory layout. Initial values are those of
    keras-contrib: t_l = 0, a_l ~ U(0, 1), t_right ~ U(0, 5), a_r = 1. Cost: O(batch units).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(
                "shape must be a number of units or the shape of a sample, each at least 1, not "
                f"{shape}"
            )
        for name in ("t_left", "a_left", "t_right", "a_right"):
            blank = torch.empty(self.shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(blank))
        self.reset_parameters(generator)

    t_left: nn.Parameter
    a_left: nn.Parameter
    t_right: nn.Parameter
    a_right: nn.Parameter

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial values again."""
        self.t_left.zero_()
        self.a_left.uniform_(0, 1, generator=generator)
        self.t_right.uniform_(0, 5, generator=generator)
        self.a_right.fill_(1)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the curve of its unit to each number."""
        beyond, width = input - self.t_left, self.t_right.abs()
        right = beyond.relu()
        middle = torch.minimum(right, width)
        left = beyond - right
        return self.t_left + middle + self.a_right * (right - middle) + self.a_left * left

    def extra_repr(self) -> str:
        return ", ".join(str(n) for n in self.shape)

"""`Frozen`: the mark of layers for inference."""

from __future__ import annotations

from typing import Any, NoReturn

from rewire.nn.weight.twin import Twin

__all__ = ["Frozen"]


class Frozen(Twin):
    """A sparse layer for inference (`rewire.nn.frozen`), which has nothing to draw or to train."""

    def reset_parameters(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises RuntimeError."""
        raise RuntimeError("a frozen layer draws no values: reset the model it was frozen from")

    def reset_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises RuntimeError."""
        self.reset_parameters()

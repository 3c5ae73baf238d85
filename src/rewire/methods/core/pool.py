"""A sparse weight as a method sees it, and the streams of its random numbers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from rewire.methods.core.recording import Recorder
from rewire.nn import SparseWeight
from rewire.topology import Positions

__all__ = ["Pool", "Purpose", "gradient_scale"]


#: Weights of a model, at most, whose streams are those of one part.
_PARTS = 1 << 16


class Purpose:
    """What random numbers are for. Each (pool, purpose) has a stream of its own, so none are ever
    used twice.
    """

    CANDIDATES, NOISE, GROW, SIGN, REDRAW, VALUE, TIES, ALLOT = range(8)
    COUNT: ClassVar[int] = 8


class Pool:
    """A sparse weight as a method sees it: with its name, number in the model, optimizer and
    parameter group.

    ``optimizer`` is the one that moves the values: of a wrapper, the innermost that has them.
    """

    def __init__(
        self,
        number: int,
        name: str,
        weight: SparseWeight,
        optimizer: Optimizer,
        group_number: int,
        place: int | None = None,
        index: int = 0,
    ) -> None:
        self.number = number
        # among all pools of the model, other methods' too
        self._place = number if place is None else place
        self.name = name
        self.weight = weight
        self.optimizer = optimizer
        self._group_number, self._index = group_number, index
        #: Learning rate that the last optimizer step used, even where a scheduler has changed it
        #: since.
        self.lr = float(self.group["lr"])
        #: Of the gradients of all positions in the next step, while a method asks for them.
        self.recorder: Recorder | None = None
        #: Of the last step before an update, (capacity,), as the optimizer used it, where a drop
        #: criterion wants it.
        self.gradient: Tensor | None = None

    def watch(self) -> None:
        """Record the next step, with the candidates there are, or else the layer's calls."""
        self.unwatch()
        self.recorder = Recorder(self, self.weight)

    def unwatch(self) -> None:
        """Forget what was recorded, and record no more."""
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None

    @property
    def group(self) -> dict[str, Any]:
        """The optimizer's parameter group; looked up, because ``optimizer.load_state_dict`` makes
        new ones.
        """
        return self.optimizer.param_groups[self._group_number]

    @property
    def allowed(self) -> Positions | None:
        """The positions that connections may have; None for all."""
        prior = self.weight.prior
        return None if prior is None else prior.allowed

    def may_go(self) -> Tensor:
        """The active slots in (row, col) order whose connections are not frozen; in the index's
        dtype, read-only.
        """
        slots = self.weight.listed()
        if self.weight.prior is None or self.weight.prior.frozen is None:
            return slots
        return slots[~self.weight.is_frozen(slots.long())]

    def keys(self, slots: Tensor) -> Tensor:
        """The flat positions (int64, ``row * cols + col``) of the connections in ``slots``."""
        return self.weight.keys_of(slots)

    def at_home(self) -> bool:
        """Whether the values are still where they were in the optimizer's groups, or else a new
        place was found.
        """
        groups, values = self.optimizer.param_groups, self.weight._parameters["values"]
        if self._group_number < len(groups):
            members = groups[self._group_number]["params"]
            if self._index < len(members) and members[self._index] is values:
                return True
        for number, group in enumerate(groups):
            for index, member in enumerate(group["params"]):
                if member is values:
                    self._group_number, self._index = number, index
                    return True
        return False

    def stream(self, purpose: int) -> int:
        """The random stream of this pool for ``purpose``."""
        return (self._place + 1 + self.weight.part * _PARTS) * Purpose.COUNT + purpose


def gradient_scale(optimizer: Optimizer) -> float:
    """What gradients are still multiplied by when ``optimizer`` steps: a GradScaler leaves it to
    fused optimizers to divide by it. 1 elsewhere.
    """
    scale = optimizer.__dict__.get("grad_scale")
    return 1.0 if scale is None else float(scale)

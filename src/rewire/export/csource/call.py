"""One operation of a network while its plan is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rewire.export.csource.plan import Buffer, Plan

__all__ = ["Call", "Handler", "ModuleHandler", "Refused"]


class Refused(ValueError):
    """An operation that cannot be written in C; the message says which, and why."""


class Call:
    """One operation while a plan is made.

    Attributes:
        plan: to add steps to. name: of the module or function, for errors.
        arguments: positional and keyword arguments with real tensors.
        inputs: the buffers of tensors among the arguments, by the ``id`` of the tensor.
        result: what PyTorch computed.
    """

    def __init__(
        self,
        plan: Plan,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: dict[int, Buffer],
        result: Any,
    ) -> None:
        self.plan, self.name = plan, name
        self.args, self.kwargs, self.inputs, self.result = args, kwargs, inputs, result
        #: Applies the operation to another tensor in the place of `x`.
        self.plan_view: Callable[[Tensor], Any] = lambda places: None

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    @property
    def x(self) -> Tensor:
        """The first argument, which must be a tensor that the network computed."""
        x = self.args[0] if self.args else self.kwargs.get("input", self.kwargs.get("x"))
        if not isinstance(x, Tensor) or id(x) not in self.inputs:
            raise self.refuse("its input is no tensor that the network computes")
        return x

    @property
    def source(self) -> Buffer:
        """The buffer of `x`."""
        return self.inputs[id(self.x)]

    def refuse(self, reason: str) -> Refused:
        """The error for this operation."""
        return Refused(f"{self.name} cannot be exported to C: {reason}")

    def helper(self, name: str, text: str, *, math: bool = False) -> str:
        """Note that a C function is called, and return its name."""
        self.plan.helpers.setdefault(name, text)
        self.plan.uses_math |= math
        return f"@{name}"

    def output(self, error: float | None) -> Buffer:
        """A buffer for the result, whose floats can be off by ``error``."""
        if not isinstance(self.result, Tensor) or not self.result.is_floating_point():
            raise self.refuse("its result is no tensor of floats")
        return self.plan.buffer(self.result, error=error)

    def grown(self, factor: float) -> float | None:
        """The error of the input times ``factor``."""
        return None if self.source.error is None else self.source.error * factor


Handler = Callable[[Call], Buffer]
ModuleHandler = Callable[[Call, Any], Buffer]

"""Optimizers that wrap others, as they are written in the field; each says where it keeps its
numbers of a pool.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

Numbers = dict[str, Tensor]


def state_of(optimizer: Optimizer, values: Tensor) -> Numbers:
    return {
        k: v for k, v in optimizer.state[values].items() if isinstance(v, Tensor) and v.dim() == 1
    }


class Wrapper(Optimizer):
    """An optimizer around another one; ``slow`` numbers are copies of values, others are moments
    that start at 0.
    """

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base
        self.param_groups = base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        self.after()
        return loss

    def after(self) -> None:
        pass

    def parameters(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"]]

    def slow(self, values: Tensor) -> Tensor | None:
        return None

    def numbers(self, values: Tensor) -> Numbers:
        slow = self.slow(values)
        return state_of(self.base, values) | ({} if slow is None else {"slow": slow})


class Lookahead(Wrapper):
    """k steps forward, one step back; slow weights are in ``state``, made at construction."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        self.time = 0
        self.keep()

    def keep(self) -> None:
        for p in self.parameters():
            self.state[p]["slow_buffer"] = p.detach().clone()

    def slow(self, values: Tensor) -> Tensor:
        found: Tensor = self.state[values]["slow_buffer"]
        return found

    def after(self) -> None:
        self.time += 1
        if self.time % 2 == 0:
            for p in self.parameters():
                slow = self.slow(p)
                slow.add_(p - slow, alpha=0.5)
                p.copy_(slow)


class LookaheadNested(Lookahead):
    """Slow weights in lists of lists, of each group."""

    def keep(self) -> None:
        self.copies = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]

    def slow(self, values: Tensor) -> Tensor:
        pairs = (
            (p, s)
            for g, c in zip(self.param_groups, self.copies, strict=True)
            for p, s in zip(g["params"], c, strict=True)
        )
        return next(s for p, s in pairs if p is values)


class LookaheadFlat(Lookahead):
    """Slow weights in one tuple over all parameters."""

    def keep(self) -> None:
        self.copies = tuple(p.detach().clone() for p in self.parameters())

    def slow(self, values: Tensor) -> Tensor:
        return next(s for p, s in zip(self.parameters(), self.copies, strict=True) if p is values)


class LookaheadDict(Lookahead):
    """Slow weights in a dict by parameter, one level down."""

    def keep(self) -> None:
        self.buffers = {p: {"z": p.detach().clone()} for p in self.parameters()}

    def slow(self, values: Tensor) -> Tensor:
        return self.buffers[values]["z"]


class LookaheadInGroups(Lookahead):
    """Slow weights in a list in each parameter group."""

    def keep(self) -> None:
        for g in self.param_groups:
            g["fast_copy"] = [p.detach().clone() for p in g["params"]]

    def slow(self, values: Tensor) -> Tensor:
        return next(
            s
            for g in self.param_groups
            for p, s in zip(g["params"], g["fast_copy"], strict=True)
            if p is values
        )


class LookaheadInside(Lookahead):
    """Slow weights in the state of the optimizer inside, made when first needed; without
    Optimizer.__init__.
    """

    def __init__(self, base: Optimizer) -> None:
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()
        self.base, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = defaultdict(dict)
        self.time = 0

    def slow(self, values: Tensor) -> Tensor:
        state = self.base.state[values]
        if "lookahead_slow_buff" not in state:
            state["lookahead_slow_buff"] = values.detach().clone()
        found: Tensor = state["lookahead_slow_buff"]
        return found

    def numbers(self, values: Tensor) -> Numbers:
        found = state_of(self.base, values)
        return {("slow" if k == "lookahead_slow_buff" else k): v for k, v in found.items()}


class SAM(Wrapper):
    """Sharpness-aware minimization: a step up, gradients there, and the real step from where it
    was.
    """

    def __init__(self, params: Any, make: Callable[[Any], Optimizer]) -> None:
        super().__init__(make(params))

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm()
        for p in self.parameters():
            if p.grad is not None:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad, alpha=0.05 / float(norm + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.data = self.state[p]["old_p"]
        self.base.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        again = torch.enable_grad()(closure)
        self.first_step()
        loss = again()
        self.second_step()
        return loss


class Several(Wrapper):
    """One optimizer of several, each for some of the parameters."""

    def __init__(self, parts: list[Optimizer]) -> None:
        Optimizer.__init__(self, [g for part in parts for g in part.param_groups], {})
        self.parts = parts
        self.param_groups = [g for part in parts for g in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for part in self.parts:
            part.step()

    def numbers(self, values: Tensor) -> Numbers:
        return next(state_of(part, values) for part in self.parts if values in part.state)


class Switch(Wrapper):
    """Begins with one optimizer and goes on with another one for the same parameters, which it
    makes at once.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        params = list(params)
        super().__init__(optim.Adam(params, 0.02))
        self.other = optim.SGD(params, 0.1, momentum=0.9)
        self.time = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.time += 1
        return (self.base if self.time <= 5 else self.other).step(closure)

    def numbers(self, values: Tensor) -> Numbers:
        return state_of(self.base, values) | state_of(self.other, values)


class Holder:
    """No optimizer, but has one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


class Indirect(Wrapper):
    """Has its optimizer in an object of another kind."""

    def __init__(self, base: Optimizer) -> None:
        Optimizer.__init__(self, base.param_groups, {})
        self.held, self.param_groups = Holder(base), base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return self.held.optimizer.step(closure)

    def numbers(self, values: Tensor) -> Numbers:
        return state_of(self.held.optimizer, values)


class Plain(optim.SGD):
    """SGD itself: what the other ones are compared with."""

    def numbers(self, values: Tensor) -> Numbers:
        return state_of(self, values)


class ClearsGradients(optim.SGD):
    """An optimizer that clears gradients within its step."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.zero_grad()

    def numbers(self, values: Tensor) -> Numbers:
        return state_of(self, values)


def momentum(params: Any) -> Optimizer:
    return optim.SGD(params, 0.1, momentum=0.9)


def adam(params: Any) -> Optimizer:
    return optim.Adam(params, 0.02)


def halves(params: Iterable[nn.Parameter]) -> Optimizer:
    params = list(params)
    return Several([adam(params[:1]), momentum(params[1:])])


#: By name: from parameters to an optimizer.
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda p: Plain(p, 0.1, momentum=0.9),
    "clears-gradients": lambda p: ClearsGradients(p, 0.1, momentum=0.9),
    "wrapper": lambda p: Wrapper(adam(p)),
    "wrapper-of-wrapper": lambda p: LookaheadNested(Lookahead(momentum(p))),
    "lookahead": lambda p: Lookahead(momentum(p)),
    "lookahead-nested": lambda p: LookaheadNested(momentum(p)),
    "lookahead-flat": lambda p: LookaheadFlat(adam(p)),
    "lookahead-dict": lambda p: LookaheadDict(momentum(p)),
    "lookahead-groups": lambda p: LookaheadInGroups(momentum(p)),
    "lookahead-inside": lambda p: LookaheadInside(momentum(p)),
    "sam-halves": lambda p: SAM(p, momentum),
    "sam-closure": lambda p: SAM(p, adam),
    "several": halves,
    "switch": Switch,
    "indirect": lambda p: Indirect(adam(p)),
}

"""NoiseOut's extra outputs: a linear head on the input of the last layer that must predict
noise.
"""

from __future__ import annotations

import copy
import inspect
import math
import weakref
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer

from rewire import random
from rewire.methods.core.layer_hooks import LayerHook
from rewire.nn.forward.modes import in_backward
from rewire.nn.forward.tensors import first_input
from rewire.nn.surgery.resize import apply_cuts, fit_shapes

__all__ = ["NoiseOutputs", "Targets", "noise_targets"]

Targets = Literal["gaussian", "binomial", "constant", "none"]


def noise_targets(
    kind: Targets,
    rows: int,
    cols: int,
    mean: float,
    deviation: float,
    *,
    seed: int,
    step: int,
    stream: int,
) -> Tensor:
    """Targets of a batch, (rows, cols), float32: N(mean, deviation^2), B(1, mean), or mean
    everywhere.
    """
    if kind == "constant":
        return torch.full((rows, cols), mean)
    if kind == "gaussian":
        return (random.normal(seed, step, stream, rows * cols) * deviation + mean).view(rows, cols)
    bound = 2**24
    drawn = random.below(seed, step, stream, torch.arange(rows * cols), bound)
    return (drawn < math.floor(mean * bound)).float().view(rows, cols)


_NOTHING_SEEN = (
    "the noise outputs' penalty saw no forward pass before this step: call model.train() before "
    "training and method.penalty() after model(x), with gradients on (not within a checkpoint of "
    "use_reentrant=True)"
)


class _Seen:
    """The head's input of one forward pass, alive as long as the graph that it hangs on."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def hang_on(self, gradients: Any) -> None:
        """A hook of the graph that changes nothing."""


class _Watch(LayerHook):
    """Tells its noise outputs of the head's calls; in copies of the model it does nothing."""

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if self.method is not None:
            self.method._capture(module, args, kwargs, output)


class NoiseOutputs:
    """Noise outputs beside the outputs of ``head``, of which the task's loss knows nothing.

    ``loss`` reaches the network through the head's input only; the outputs' own weights are trained
    by `update`, from the same batches, by an optimizer of the same class and options as the head's
    (SGD with its rate for classes that cannot be made so). So the user's optimizer keeps its
    groups, and a GradScaler's factor stays out of the weights.

    Forward passes count that are of ``model`` itself (not of a copy), in training mode, with
    gradients, outside of backward passes (where a checkpoint computes again what was seen before),
    and whose graph is still alive when `loss` is asked: what is held of a forward pass hangs on its
    graph, so a pass that was thrown away is gone. Only the last pass is held beyond that, until the
    next one or the end of the step: it counts where no other does. In compiled code, where nothing
    can hang on a graph, all since the last call or step count.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Linear,
        optimizer: Optimizer,
        *,
        kind: Targets,
        outputs: int,
        mean: float,
        deviation: float,
        seed: int,
        stream: int,
    ) -> None:
        self.model, self.head, self.kind, self.mean, self.deviation = (
            model,
            head,
            kind,
            mean,
            deviation,
        )
        self._stream, self._optimizer = stream, optimizer
        weight = head.weight
        self.layer = nn.Linear(head.in_features, outputs, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():  # nn.Linear's own distribution, from the method's numbers
            bound = 1 / math.sqrt(head.in_features)
            uniform = random.below(
                seed, 0, stream, torch.arange(outputs * (head.in_features + 1)), 2**24
            )
            flat = (uniform.to(torch.float64) / 2**23 - 1) * bound
            self.layer.weight.copy_(
                flat[: -outputs or None].view(outputs, -1)[:, : head.in_features]
            )
            self.layer.bias.copy_(flat[-outputs:])
        self.own = self._make_optimizer()
        self._waiting: list[weakref.ref[_Seen]] = []
        self._last: Tensor | None = None
        self._compiled: list[Tensor] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._asked = False
        #: The hook on the head.
        self.handle: Any = head.register_forward_hook(_Watch(self).after, with_kwargs=True)

    def _group(self) -> dict[str, Any]:
        for group in self._optimizer.param_groups:
            if any(p is self.head.weight for p in group["params"]):
                return group
        return self._optimizer.param_groups[0]

    def _make_optimizer(self) -> Optimizer:
        kind, parameters = type(self._optimizer), list(self.layer.parameters())
        known = inspect.signature(kind.__init__).parameters
        if not isinstance(self._optimizer, LBFGS):
            try:
                return kind(
                    parameters, **{k: v for k, v in self._optimizer.defaults.items() if k in known}
                )
            except (TypeError, ValueError):
                pass
        return SGD(parameters, lr=float(self._group().get("lr", 0.01)))

    def _capture(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        x: Tensor = first_input(module, args, kwargs)
        if not (self.model.training and torch.is_grad_enabled() and x.requires_grad):
            return
        if torch.compiler.is_compiling():
            self._compiled.append(x)
        elif output.grad_fn is not None and not in_backward():
            seen = _Seen(x)
            # x comes before the output's graph: no cycle
            output.grad_fn.register_prehook(seen.hang_on)
            self._waiting.append(weakref.ref(seen))
            self._last = x

    def loss(self, seed: int, step: int) -> Tensor:
        """Mean over the batch of the summed squared errors, for the forward passes since the last
        call.

        Targets are those of (seed, step).
        """
        total = torch.zeros((), device=self.layer.weight.device)
        self._asked = True
        alive = [seen.x for reference in self._waiting if (seen := reference()) is not None]
        if not alive and self._last is not None:
            alive = [self._last]
        for x in [*alive, *self._compiled]:
            h = x.reshape(-1, x.shape[-1]).to(self.layer.weight.dtype)
            # A stream of its own for each call of a step; targets are drawn anew for every batch.
            stream = self._stream + 2**16 * (len(self._pairs) + 1)
            y = noise_targets(
                self.kind,
                len(h),
                self.layer.out_features,
                self.mean,
                self.deviation,
                seed=seed,
                step=step,
                stream=stream,
            ).to(h)
            self._pairs.append((h.detach(), y))
            out = nn.functional.linear(h, self.layer.weight.detach(), self.layer.bias.detach())
            total = total + (out - y).square().sum(1).mean()
        self._drop_graphs()
        return total

    def _drop_graphs(self) -> None:
        self._waiting.clear()
        self._compiled.clear()
        self._last = None

    @torch.enable_grad()
    def update(self, strength: float) -> None:
        """One step of the outputs' own weights, on what `loss` saw since the last one.

        RuntimeError if `loss` was asked since, and there was nothing to see.
        """
        if not self._pairs:
            if self._asked and any(
                p.requires_grad for p in self.model.parameters() if p is not self.head.weight
            ):
                self.forget()
                raise RuntimeError(_NOTHING_SEEN)
            return
        options = {
            k: v
            for k, v in self._group().items()
            if k != "params" and k in self.own.param_groups[0]
        }
        self.own.param_groups[0].update(options)
        self.own.zero_grad()
        losses = [(self.layer(h) - y).square().sum(1).mean() for h, y in self._pairs]
        (strength * torch.stack(losses).sum()).backward()
        self.own.step()

    def forget(self) -> None:
        """Hold nothing of forward passes any more: a step is over, or the network has another
        shape.
        """
        self._drop_graphs()
        self._pairs.clear()
        self._asked = False

    @torch.no_grad()
    def merge(self, at: Tensor, into: Tensor | None, alpha: float, beta: float) -> None:
        """Do without the inputs ``at``, which are alpha times those ``into`` plus beta (positions,
        as they are now).
        """
        columns = self.layer.weight[:, at]
        if into is not None:
            self.layer.weight.index_add_(1, into, columns * alpha)
        self.layer.bias.add_(columns.sum(1), alpha=beta)
        keep = torch.ones(self.layer.in_features, dtype=torch.bool)
        keep[at] = False
        apply_cuts(self.layer, {"weight": {1: keep.nonzero().flatten()}}, [self.layer], [self.own])

    def state(self) -> dict[str, Any]:
        """Copies of weights and optimizer, tensors and numbers."""
        weight, bias = self.layer.weight.detach().clone(), self.layer.bias.detach().clone()
        kept = copy.deepcopy(self.own.state_dict()["state"])
        return {"weight": weight, "bias": bias, "optimizer": [kept.get(i) for i in range(2)]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state`'s result, whatever the number of inputs was."""
        fit_shapes(self.layer, {"weight": state["weight"].shape, "bias": state["bias"].shape})
        with torch.no_grad():
            self.layer.weight.copy_(state["weight"])
            self.layer.bias.copy_(state["bias"])
        kept = {i: dict(s) for i, s in enumerate(state["optimizer"]) if s}
        self.own.load_state_dict({**self.own.state_dict(), "state": kept})
        self.forget()

"""Quantized weights in the place of dense ones: plus or minus one scale, or zero."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rewire.methods.core.layer_hooks import LayerHook

__all__ = ["Rule", "quantize", "quantize_parts", "quantizing_hooks", "threshold_slope"]


class _Quantize(torch.autograd.Function):
    """Plus or minus ``scale`` where ``keep``, else 0; the gradient goes straight through where
    ``passes``.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, keep: Tensor, scale: Tensor, passes: Tensor) -> Tensor:
        ctx.save_for_backward(passes)
        return torch.where(keep, torch.copysign(scale, w), torch.zeros_like(w))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (passes,) = ctx.saved_tensors
        return gradients[0] * passes, None, None, None


def quantize(w: Tensor, keep: Tensor, *, scaled: bool, clip: float, frozen: bool) -> Tensor:
    """``scale * sign(w)`` where ``keep``, else 0, in the shape of ``w``; differentiable by
    straight-through.

    scale: the mean of |w| over ``keep`` if ``scaled`` (Li and Liu 2016, ternary weight networks),
        else 1. The gradient
    passes unchanged where |w| <= ``clip`` (Courbariaux et al. 2016) and, if the mask is ``frozen``,
    only where ``keep``. The sign of a zero is its sign bit, so that every survivor has one. Cost:
    O(M).
    """
    size = w.detach().abs()
    scale = (size * keep).sum() / keep.sum().clamp(min=1) if scaled else size.new_ones(())
    passes = size <= clip
    found: Tensor = _Quantize.apply(w, keep, scale, passes & keep if frozen else passes)  # type: ignore[no-untyped-call]
    return found


def threshold_slope(
    w: Tensor, gradient: Tensor, threshold: float, *, scaled: bool
) -> tuple[float, int]:
    """An estimate of the loss's derivative by the threshold (in units of w), and the number of
    survivors.

    ``gradient`` is that by the quantized weight, Q. Q jumps at the threshold, so its derivative is
    taken of Q smoothed over a box of half the threshold to each side: ``-scale sign(w) / (2 h)``
    where ``| |w| - threshold | < h = threshold / 2``, else 0. Ours, see `Ternary`. Cost: O(M).
    """
    size = w.abs()
    keep = size > threshold
    count = int(keep.count_nonzero())
    half = threshold / 2
    if not half:
        return 0.0, count
    scale = float((size * keep).sum()) / count if scaled and count else 1.0
    edge = (size > threshold - half) & (size < threshold + half)
    return -scale * float((w.sign() * gradient * edge).sum()) / (2 * half), count


@dataclass(frozen=True)
class Rule:
    """How one weight is quantized: by its frozen mask, or else by the threshold, a share of its
    largest magnitude.
    """

    mask: Tensor | None
    threshold: float
    scaled: bool
    clip: float

    def keep(self, w: Tensor) -> Tensor:
        """Which entries are not 0; ``w`` without gradient."""
        if self.mask is not None:
            return self.mask
        size = w.abs()
        return size > self.threshold * size.max()

    def __call__(self, w: Tensor) -> Tensor:
        """What the forward pass uses in place of the dense values ``w``."""
        keep = self.keep(w.detach()).to(w.device)
        return quantize(w, keep, scaled=self.scaled, clip=self.clip, frozen=self.mask is not None)

    def copied(self) -> Rule:
        """With a mask of its own."""
        return self if self.mask is None else replace(self, mask=self.mask.clone())


@torch.no_grad()
def quantize_parts(stacked: Tensor, parts: list[tuple[Rule, int, Tensor]]) -> Tensor:
    """A parameter with its weights quantized, each of which begins at a place of its own and has
    the shape given.
    """
    flat = stacked.detach().clone(memory_format=torch.contiguous_format).view(-1)
    for rule, first, like in parts:
        part = flat[first : first + like.numel()].view(like.shape)
        part.copy_(rule(part))
    return flat.view(stacked.shape)


class _Quantizer(LayerHook):
    """Puts quantized weights in the place of a layer's parameters for the time of its forward pass.

    That of a copy goes on with the thresholds or masks of the moment of copying.
    """

    def __init__(self, method: Any, layer: nn.Module) -> None:
        super().__init__(method)
        # parameter -> (number, which third; None: all)
        self._parts: dict[str, list[tuple[int, int | None]]] = {}
        for number, weight in enumerate(method.weights):
            if weight.layer is layer:
                name, third = _place(layer, weight.path)
                self._parts.setdefault(name, []).append((number, third))
        self._rules: dict[int, Rule] = {}  # of a copy, by number of the weight
        # By module, because shallow copies and replicas of the layer share this hook.
        self._replaced: dict[int, list[tuple[nn.Module, str, nn.Parameter]]] = {}

    def copied(self) -> _Quantizer:
        method = self.method
        found = _Quantizer.__new__(_Quantizer)
        found.__dict__ |= {"_parts": self._parts, "_rules": self._rules, "_replaced": {}}
        if method is not None:
            numbers = [number for members in self._parts.values() for number, _ in members]
            found._rules = {number: method.rule(number).copied() for number in numbers}
        return found

    def _quantized(self, number: int, w: Tensor) -> Tensor:
        rule = self._rules.get(number) if self.method is None else self.method.rule(number)
        return w if rule is None else rule(w)

    def before(self, module: nn.Module, args: Any) -> None:
        if self.method is None and not self._rules:
            return
        swaps: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = []
        for name, members in self._parts.items():
            parent, _, leaf = name.rpartition(".")
            owner = module.get_submodule(parent)
            dense = owner.get_parameter(leaf)
            if members[0][1] is None:
                swaps.append((owner, leaf, dense, self._quantized(members[0][0], dense)))
                continue
            thirds = list(dense.chunk(3))
            for number, third in members:
                assert third is not None
                thirds[third] = self._quantized(number, thirds[third])
            swaps.append((owner, leaf, dense, torch.cat(thirds)))
        self._replaced[id(module)] = [(owner, leaf, dense) for owner, leaf, dense, _ in swaps]
        for owner, leaf, _, tensor in swaps:
            owner._parameters[leaf] = tensor  # type: ignore[assignment]

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        for owner, leaf, dense in self._replaced.pop(id(module), []):
            owner._parameters[leaf] = dense
        if isinstance(module, nn.RNNBase):
            # its list of weights, where the quantized ones must not stay
            module._init_flat_weights()


def quantizing_hooks(method: Any, layer: nn.Module) -> list[Any]:
    quantizer = _Quantizer(method, layer)
    return [
        layer.register_forward_pre_hook(quantizer.before),
        layer.register_forward_hook(quantizer.after, always_call=True),
    ]


_STACKED = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _place(layer: nn.Module, path: str) -> tuple[str, int | None]:
    """The parameter that holds the weight at ``path``, and which third of it the weight is (None:
    all of it).
    """
    if isinstance(layer, nn.MultiheadAttention) and layer._qkv_same_embed_dim and path in _STACKED:
        return "in_proj_weight", _STACKED.index(path)
    return path, None

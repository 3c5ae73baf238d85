"""Sparse ternary networks: learned quantization thresholds, a frozen mask, and survivors of plus or
minus one scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.methods.core.base import Evaluate, Pool
from rewire.methods.core.parameters import Epochs, NonNegative, parameter, setting
from rewire.methods.core.pool import gradient_scale
from rewire.methods.core.registry import register
from rewire.methods.core.runs import Run
from rewire.methods.core.state import copied
from rewire.methods.dense_start.dense import DenseStart, largest
from rewire.methods.dense_start.quantize import (
    Rule,
    quantize_parts,
    quantizing_hooks,
    threshold_slope,
)
from rewire.nn.convert.cut import to_sparse
from rewire.nn.structure import Part, announce
from rewire.schedules import Schedule, at

__all__ = ["Ternary"]

#: A threshold is at most this share of the largest magnitude, so that something always stays above
#: it.
HIGHEST = 0.999


@register(
    name="ternary",
    paper="Faraone et al., ICONIP 2017 (arXiv 1709.06262), reconstructed from its abstract",
    summary="learned quantization thresholds make weights 0 or plus or minus one scale; then the "
    "mask is frozen",
    guarantees=(
        "after finalize() every weight in scope has one magnitude",
        "at most the given share of the weights with trained thresholds is left by stage 2",
        "finalize() changes no output",
    ),
)
class Ternary(DenseStart):
    """Sparse ternary weights in three stages. The paper's body could not be had: this is a
    RECONSTRUCTION of what its abstract says (L2 and a regularizer on quantization thresholds;
    quantization pruning; retraining)::

        1  min loss(Q(W)) + l2 sum ||W||^2 - push sum_l t_l
           Q = scale sign(w) where |w| > t_l max |W_l|, else 0
        2  the mask Q != 0 is frozen (beyond ``density``, the smallest |w| / (t_l max |W_l|) go too)
        3  the survivors are trained on, plus or minus scale; no regularizers

    Forward passes use Q, the optimizer moves the dense weights, and gradients go straight through
    (`quantize`). The threshold t_l is a share of the largest magnitude of its weight. What is ours:
    the threshold's gradient (`threshold_slope`, divided by the square root of the number of
    survivors, as in LSQ, Esser et al. 2020), its plain SGD at the weight's learning rate, and that
    the push stops where the whole scope has come down to ``density``. The gradient by Q is read
    from ``weight.grad`` just before the optimizer's step, so no loss scaling reaches it.

    `finalize` leaves sparse layers with values of exactly plus or minus scale (`rewire.to_sparse`;
    the optimizers follow); `rewire.export.save_ternary` packs them to a sign bit and an index each.

    Layers are quantized by hooks on their forward pass: names, state_dict and optimizer see the
    dense weights until `finalize`. Cost: O(M) time per forward pass and step, O(M) memory.
    """

    threshold: NonNegative = parameter(
        default=0.05,
        high=HIGHEST,
        help="t of every weight at the start, a share of its largest magnitude",
    )
    trainable: bool = setting(
        default=True, help="whether thresholds are trained; otherwise they stay"
    )
    push: NonNegative | Schedule = parameter(
        default=1e-2,
        help="strength of the regularizer that raises thresholds; a schedule is over epochs",
    )
    l2: NonNegative | Schedule = parameter(
        default=1e-5, help="strength of the L2 term of stage 1; a schedule is over epochs"
    )
    after_epochs: Epochs | Literal["auto"] = setting(
        default="auto",
        help='when stages 2 and 3 begin; "auto": at the end of the epoch in which the share of '
        "survivors has first come down to ``density`` (it hovers there from then on); at the last "
        "epoch's end anyway, after which nothing trains what is left. `rewire train` freezes in "
        "the middle of the run",
    )
    scale: Literal["mean", "one"] = setting(
        default="mean", help="the mean magnitude of a weight's survivors, or 1"
    )
    clip: float | None = parameter(
        default=1.0,
        above=0,
        help="no gradient goes to dense weights of a larger magnitude; None: it goes to all",
    )
    threshold_lr: NonNegative = parameter(
        default=1.0, help="learning rate of the thresholds, in multiples of their weight's"
    )

    # thresholds move by SGD of the weights' rate, so that rate must be one of SGD
    run_optimizer = "sgd"

    @classmethod
    def run_options(cls, run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
        """Masks freeze in the middle of the run, so that what is left is trained, and thresholds
        move at half the weights' rate, at which none ran away (docs/defaults.md).
        """
        options: dict[str, Any] = {"threshold_lr": 0.5}
        return options if run.epochs < 2 else options | {"after_epochs": max(1, run.epochs // 2)}

    def _check(self) -> None:
        if self.after_epochs == "auto" and not self.trainable:
            raise ValueError(
                "after_epochs='auto' waits for thresholds to rise: give a number of epochs, or "
                "trainable=True"
            )
        super()._check()

    def _setup(self) -> None:
        #: 1 while thresholds are trained, 3 once the masks are frozen (stage 2 is that moment).
        self.stage = 1
        self._thresholds = [float(self.threshold)] * len(self.weights)
        self._masks: list[Tensor] = []
        self._penalised = self._reached = False
        self._slopes: dict[int, tuple[float, int]] = {}
        self._before_step(Ternary._note_slopes)
        for layer in dict.fromkeys(w.layer for w in self.weights):
            self._attachment.hold(*quantizing_hooks(self, layer))

    # --- what it does to the weights --------------------------------------------------------------

    def masks(self) -> dict[str, Tensor]:
        """Which entries are not zero now, by name of the weight."""
        return {w.name: self.rule(i).keep(w.tensor.detach()) for i, w in enumerate(self.weights)}

    def thresholds(self) -> dict[str, float]:
        """The thresholds t, shares of the largest magnitude, by name of the weight."""
        return {w.name: t for w, t in zip(self.weights, self._thresholds, strict=True)}

    def survivors(self) -> float:
        """Share of the entries in scope that are not zero now. Cost: O(M)."""
        return sum(self.count_connections().values()) / sum(w.tensor.numel() for w in self.weights)

    def rule(self, number: int) -> Rule:
        """How the forward pass quantizes weight ``number`` now."""
        mask = self._masks[number] if self.stage == 3 else None
        return Rule(mask, self._thresholds[number], self.scale == "mean", self.clip or math.inf)

    # --- training ---------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """``l2 sum ||W||^2`` in stage 1, else 0; the push on the thresholds is applied in
        `step`.
        """
        strength = self._now("l2", self.epochs)
        if self.stage == 3 or not strength:
            return super().penalty()
        self._penalised = True
        return strength * torch.stack([w.tensor.square().sum() for w in self.weights]).sum()

    @torch.no_grad()
    def _note_slopes(self, optimizer: Optimizer) -> None:
        """Note the slopes of the thresholds whose weights ``optimizer`` is about to move."""
        if self.stage == 3 or not self.trainable:
            return
        l2 = at(self.l2, self.epochs) if self._penalised else 0.0
        for i, weight in enumerate(self.weights):
            gradient = weight.gradient
            if weight.optimizer is optimizer and gradient is not None:
                w = weight.tensor.detach()
                largest = float(w.abs().max())
                gradient = gradient / gradient_scale(optimizer)
                by_q = gradient - 2 * l2 * w if l2 else gradient
                slope, count = threshold_slope(
                    w, by_q, self._thresholds[i] * largest, scaled=self.scale == "mean"
                )
                self._slopes[i] = slope * largest / max(count, 1) ** 0.5, count

    def _after_step(self, pools: list[Pool]) -> None:
        self._penalised = False
        slopes, self._slopes = self._slopes, {}
        if not slopes:
            return
        push = self._now("push", self.epochs)
        if len(slopes) == len(self.weights):  # counted already, just before the step
            share = sum(count for _, count in slopes.values()) / sum(
                w.tensor.numel() for w in self.weights
            )
        else:
            share = self.survivors()
        if share <= self.density:
            self._reached, push = True, 0.0
        for i, (slope, _) in slopes.items():
            rate = float(self.weights[i].group["lr"]) * self.threshold_lr
            self._thresholds[i] = min(
                max(self._thresholds[i] - rate * (slope - push), 0.0), HIGHEST
            )

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        if self.stage == 1:
            due = self._reached if self.after_epochs == "auto" else self.epochs >= self.after_epochs
            if due or last:
                self.freeze()

    def _schedule(self) -> str | None:
        if self.after_epochs == "auto":
            return (
                f"after_epochs='auto' waits until at most density={self.density} is left, and "
                f"{self.survivors():.3g} is"
            )
        return f"after_epochs={self.after_epochs}"

    @torch.no_grad()
    def freeze(self, *, cut: bool = True) -> None:
        """Stage 2: freeze the masks, cut to ``density`` or as they are; stage 3 begins. `end_epoch`
        does it by itself.

        Cost: O(M log M) if it cuts.
        """
        if self.stage == 3:
            return
        masks = self.masks()
        if cut and self.trainable and self.survivors() > self.density:
            # As if all thresholds were raised by one factor: what stays is largest in multiples of
            # its threshold.
            floor = torch.finfo(torch.float32).tiny
            tops = [
                max(float(w.tensor.abs().max()) * t, floor)
                for w, t in zip(self.weights, self._thresholds, strict=True)
            ]
            ratios = {w.name: w.tensor / top for w, top in zip(self.weights, tops, strict=True)}
            masks = {
                name: masks[name] & mask for name, mask in largest(ratios, self.density).items()
            }
        self._masks = list(masks.values())
        self.stage = 3
        self.updates += 1

    # --- the end ----------------------------------------------------------------------------------

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        """Make the layers in scope sparse ones of plus or minus scale, let the optimizers follow,
        return the model.

        No output changes. Where stage 2 has not been reached, what is above the thresholds stays,
        however much it is.
        """
        if not self._attachment.attached:
            return self.model
        self._warn_of_no_update()
        self.freeze(cut=False)
        super().finalize()
        owners: dict[Tensor, list[tuple[int, int]]] = {}
        for i, weight in enumerate(self.weights):
            w = weight.tensor
            # attention stacks three weights in one parameter
            owner = w if w._base is None else w._base
            owners.setdefault(owner, []).append(
                (i, int(w.storage_offset() - owner.storage_offset()))
            )
        for owner, places in owners.items():
            take = partial(
                quantize_parts,
                parts=[(self.rule(i), first, self.weights[i].tensor) for i, first in places],
            )
            owner.copy_(take(owner))
            announce(owner, [Part(owner, take)])
        self.model = to_sparse(self.model, self.masks(), self.optimizers)
        return self.model

    def count_connections(self) -> dict[str, int]:
        """Entries of each weight in scope that are not zero now, by name. Cost: O(M)."""
        return {name: int(mask.count_nonzero()) for name, mask in self.masks().items()}

    def active_masks(self) -> dict[str, Tensor]:
        """As `masks`: the values themselves become 0 in the forward pass only."""
        return self.masks()

    def stats(self) -> dict[str, Any]:
        """Counts as every method's, the stage and the thresholds."""
        return super().stats() | {"stage": self.stage, "thresholds": self.thresholds()}

    # --- saving -----------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        own = {"thresholds": self._thresholds, "masks": self._masks}
        return {"stage": self.stage, "reached": self._reached, **copied(own)}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        stage, reached = int(state["stage"]), bool(state["reached"])
        thresholds = [*map(float, state["thresholds"])]
        masks = [
            m.to(w.tensor.device, torch.bool)
            for m, w in zip(state["masks"], self.weights, strict=stage == 3)
        ]
        if stage not in (1, 3) or len(thresholds) != len(self.weights):
            raise ValueError(f"this state is damaged: stage {stage}, {len(thresholds)} thresholds")
        if any(m.shape != w.tensor.shape for m, w in zip(masks, self.weights, strict=False)):
            raise ValueError("this is the state of weights of other shapes")
        self.stage, self._reached = stage, reached
        self._thresholds, self._masks = thresholds, [m.clone() for m in masks]

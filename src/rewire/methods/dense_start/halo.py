"""HALO: hierarchical adaptive lasso, a learned penalty for every weight, and the cut at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewire.methods.core.base import Evaluate, Pool
from rewire.methods.core.parameters import Epochs, NonNegative, parameter, setting
from rewire.methods.core.registry import register
from rewire.methods.core.runs import Run
from rewire.methods.core.state import copied
from rewire.methods.dense_start.dense import DenseStart, largest
from rewire.nn.convert.cut import to_sparse
from rewire.schedules import Schedule

__all__ = ["FLOOR", "Halo", "Variant", "penalty_of"]

Variant = Literal["halo", "squared", "sws", "l1"]

#: Least value of lambda: 1 / lambda^2 has a pole at 0.
FLOOR = 1e-3


def penalty_of(
    variant: Variant, weights: Iterable[tuple[Tensor, Tensor | None]], xi: float, psi: float
) -> tuple[Tensor, Tensor]:
    """The two terms, (of the weights, of lambda), for pairs of a weight and its lambda (None: fixed
    at 1).

    Lambdas have the weight's shape, or none (one number for all of it); one that several weights
    share counts once. Differentiable in both. See `Halo`.
    """
    pairs = list(weights)
    first = torch.stack(
        [(w.abs() if a is None else w.abs() / a.square()).sum() for w, a in pairs]
    ).sum()
    lambdas = {id(a): a for _, a in pairs if a is not None}.values()
    sizes = [(a.square() if variant == "sws" else a.abs()).sum() for a in lambdas]
    second = torch.stack(sizes).sum() if sizes else first.new_zeros(())
    return xi * first, psi * (second.square() if variant == "squared" else second)


@register(
    name="halo",
    paper="Seto, Wells, Zhang, SDM 2021 (arXiv 2008.10183)",
    summary="dense training with a learned lasso penalty for every weight, then one global "
    "magnitude cut",
    guarantees=("after finalize() exactly the given share of the weights in scope exists",),
)
class Halo(DenseStart):
    """Train dense with the loss plus `penalty`, and cut once::

        halo     xi sum |w| / lambda^2 + psi sum |lambda|   one trainable lambda per weight entry
        squared  xi sum |w| / lambda^2 + psi (sum |lambda|)^2
        sws      xi sum |w| / lambda^2 + psi lambda^2       one lambda for many entries (``shared``)
        l1       xi sum |w|                                      lambda fixed at 1

    At lambda's minimum, lambda* = (2 xi |w| / psi)^(1/3), "halo" is 3 / 2^(2/3) (xi psi^2)^(1/3)
    |w|^(1/3): large weights are shrunk little, small ones much. Lambda moves by SGD of its own,
    with the learning rate, momentum and weight decay that the weight's optimizer has at that
    moment, as in the authors' code; a schedule of the model's rate therefore acts on lambda once
    (their `adjust_learning_rate` multiplied it a second time). Lambda stays at 1e-3 or more. Both
    sums are over all entries, unnormalised: the authors' xi = psi = 1e-8 is for millions of
    convolution weights. Where the optimizer decays weights, lambda is decayed too, and that soon
    outweighs a small psi: the penalty is then 2 sqrt(xi decay / 2) |w|^(1/2) at its minimum.
    Lambda's own slopes are as small as xi and psi, so at the weights' rate (``lambda_lr=1``, the
    authors') it hardly moves in a short training: the default is what a perceptron on MNIST needs
    within a few epochs (docs/halo_ternary.md).

    The cut keeps the ``density`` of the entries in scope that is largest in magnitude, over all
    weights together; a weight may be left with nothing. It is `finalize` that cuts (the authors'
    way), or the end of epoch ``after_epochs``: what is left then trains on, without a penalty.
    `finalize` makes sparse layers of it (`rewire.to_sparse`; the optimizers follow). The authors
    act on all convolutions on CIFAR-10, on everything on MNIST.

    Call `penalty` in the loss of every step; with gradient accumulation, in that of one of the
    micro-batches, or divide it as the loss is divided: it is of the weights only, so the same in
    all of them. It is differentiable in the weights; lambda's gradient is kept inside, where no
    loss scaling reaches it.

    Cost: O(M) time per step and, besides the dense weights, O(M) memory (lambda, and its momentum).
    """

    xi: NonNegative | Schedule = parameter(
        default=4e-5, help="of the weights' term; a schedule is over epochs"
    )
    psi: NonNegative | Schedule = parameter(
        default=4e-5, help="of lambda's term; a schedule is over epochs"
    )
    variant: Variant = setting(default="halo", help="which penalty, see above")
    shared: Literal["model", "weight"] = setting(
        default="model", help='"sws" has one lambda for the whole model or one for each weight'
    )
    after_epochs: Epochs | None = parameter(
        default=None,
        help="when to cut; None leaves it to `finalize`. `rewire train` cuts after three quarters "
        "of the run",
    )
    lambda_start: float = parameter(default=1.0, low=FLOOR, help="what lambda starts at")
    lambda_lr: NonNegative = parameter(
        default=100.0, help="learning rate of lambda, in multiples of its weight's"
    )
    lambda_momentum: float | None = parameter(
        default=None,
        low=0,
        below=1,
        help="of lambda's SGD; None is the optimizer's own (0 where it has none)",
    )
    lambda_decay: NonNegative | None = parameter(
        default=None, help="weight decay of lambda; None is the optimizer's own"
    )

    # lambda moves by SGD of the weights' rate, so that rate must be one of SGD
    run_optimizer = "sgd"

    @classmethod
    def run_options(cls, run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
        """What is left after the cut trains for the last quarter of the run."""
        cuts = "after_epochs" in given or run.epochs < 2
        return {} if cuts else {"after_epochs": max(1, 3 * run.epochs // 4)}

    def _setup(self) -> None:
        self._lambda = self._start()
        self._buffers = [torch.zeros_like(a) for a in self._lambda]
        self._gradients: list[Tensor] | None = None
        self._kept: dict[str, Tensor] | None = None  # the masks, once it is cut

    def _start(self) -> list[Tensor]:
        """One lambda for each weight, for all together, or none."""
        like = [w.tensor.detach() for w in self.weights]
        if self.variant == "l1":
            return []
        if self.variant == "sws":
            like = [t.new_empty(()) for t in (like if self.shared == "weight" else like[:1])]
        return [
            torch.full_like(t, self.lambda_start, memory_format=torch.contiguous_format)
            for t in like
        ]

    def _of(self, number: int) -> int:
        """Which lambda the weight has."""
        return number if len(self._lambda) > 1 else 0

    def lambdas(self) -> dict[str, Tensor]:
        """Lambda of every weight, by its name: a copy of the weight's shape, or a scalar ("sws");
        none for "l1".
        """
        return {
            w.name: self._lambda[self._of(i)].clone()
            for i, w in enumerate(self.weights)
            if self._lambda
        }

    # --- training ---------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """The penalty at this moment, a scalar that is differentiable in the weights; 0 after the
        cut. Cost: O(M).
        """
        if self._kept is not None:
            return super().penalty()
        xi, psi = self._now("xi", self.epochs), self._now("psi", self.epochs)
        tensors = [w.tensor for w in self.weights]
        pairs = [
            (t, self._lambda[self._of(i)] if self._lambda else None) for i, t in enumerate(tensors)
        ]
        with torch.no_grad():
            self._gradients = self._derivatives([t.detach() for t in tensors], xi, psi)
        first, second = penalty_of(self.variant, pairs, xi, psi)
        return first + second

    def _derivatives(self, tensors: list[Tensor], xi: float, psi: float) -> list[Tensor]:
        """Of the penalty, by each lambda."""
        total = (
            sum(float(a.abs().sum()) for a in self._lambda) if self.variant == "squared" else 0.0
        )
        found = []
        for i, a in enumerate(self._lambda):
            mine = [t for k, t in enumerate(tensors) if self._of(k) == i]
            size = mine[0].abs() if a.dim() else torch.stack([t.abs().sum() for t in mine]).sum()
            pull = {"halo": psi, "squared": 2 * psi * total}.get(self.variant)
            slope = 2 * psi * a if pull is None else pull * a.sign()
            found.append(slope - 2 * xi * size / a**3)
        return found

    def _after_step(self, pools: list[Pool]) -> None:
        if self._kept is not None:
            self._silence(self._kept)
            return
        if self._gradients is None:
            raise RuntimeError(
                "the loss of this step had no penalty: add method.penalty() to the "
                "loss of every step"
            )
        gradients, self._gradients = self._gradients, None
        for i, (a, buffer, gradient) in enumerate(
            zip(self._lambda, self._buffers, gradients, strict=True)
        ):
            group = self.weights[i].group
            decay = (
                float(group.get("weight_decay", 0.0))
                if self.lambda_decay is None
                else self.lambda_decay
            )
            momentum = (
                float(group.get("momentum", 0.0))
                if self.lambda_momentum is None
                else self.lambda_momentum
            )
            buffer.mul_(momentum).add_(gradient).add_(a, alpha=decay)
            # The penalty is even in lambda, so positive ones are all there is; a step across the
            # pole ends before it.
            a.sub_(buffer, alpha=float(group["lr"]) * self.lambda_lr).clamp_(min=FLOOR)

    # --- the end ----------------------------------------------------------------------------------

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        if (
            self._kept is None
            and self.after_epochs is not None
            and self.epochs >= self.after_epochs
        ):
            self._kept = self.masks()
            self._silence(self._kept)
            self.updates += 1

    def _schedule(self) -> str | None:
        return None if self.after_epochs is None else f"after_epochs={self.after_epochs}"

    def _silence(self, masks: Mapping[str, Tensor]) -> None:
        """Set to 0 what is cut: momentum and decay go on moving it."""
        for weight in self.weights:
            weight.tensor.mul_(masks[weight.name])

    def masks(self, density: float | None = None) -> dict[str, Tensor]:
        """What the cut keeps, or would keep now (at ``density``; the method's own by default), by
        the weight's name.
        """
        if self._kept is not None and density is None:
            return dict(self._kept)
        return largest(
            {w.name: w.tensor for w in self.weights}, self.density if density is None else density
        )

    def count_connections(self) -> dict[str, int]:
        """Entries of each weight in scope, by name: all of them until the cut."""
        if self._kept is not None:
            return {name: int(mask.count_nonzero()) for name, mask in self._kept.items()}
        return {w.name: w.tensor.numel() for w in self.weights}

    def finalize(self) -> nn.Module:
        """Cut, replace the layers in scope by sparse ones, let the optimizers follow, and return
        the model.
        """
        if not self._attachment.attached:
            return self.model
        self._warn_of_no_update()
        masks = self.masks()
        super().finalize()
        self.model = to_sparse(self.model, masks, self.optimizers)
        return self.model

    # --- saving -----------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        own = {"lambda": self._lambda, "momentum": self._buffers, "kept": self._kept}
        return dict(copied(own))

    def _load_state(self, state: Mapping[str, Any]) -> None:
        kept: Mapping[str, Tensor] | None = state["kept"]
        if kept is not None and any(kept[w.name].shape != w.tensor.shape for w in self.weights):
            raise ValueError("this is the state of weights of other shapes")
        mine = [*self._lambda, *self._buffers]
        given = [*state["lambda"], *state["momentum"]]
        shapes = [tuple(t.shape) for t in given]
        if shapes != [tuple(t.shape) for t in mine]:
            raise ValueError(f"this is the state of weights of other shapes: {shapes}")
        for target, source in zip(mine, given, strict=True):
            target.copy_(source)
        places = {w.name: w.tensor.device for w in self.weights}
        self._kept = (
            None if kept is None else {n: kept[n].to(at, copy=True) for n, at in places.items()}
        )

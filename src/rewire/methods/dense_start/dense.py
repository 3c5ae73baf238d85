"""What methods that start from dense layers share: the weights they act on, and the cut that ends
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire import budget
from rewire.methods.core.base import Method
from rewire.methods.core.parameters import Patterns, fits, parameter
from rewire.nn.convert import attached
from rewire.nn.convert.cut import dense_weights
from rewire.nn.convert.kinds import join, kind_of
from rewire.nn.convert.replacing import refuse_shared
from rewire.nn.optimizers.membership import Home, homes_of, only_home
from rewire.nn.optimizers.wrappers import listed, movers

__all__ = ["DenseStart", "DenseWeight", "in_scope", "largest"]


class DenseWeight:
    """A dense weight that a method acts on: its layer, its optimizer and parameter group."""

    def __init__(self, name: str, layer_name: str, layer: nn.Module, home: Home) -> None:
        self.name = name
        self.layer_name = layer_name
        self.layer = layer
        self.path = name[len(layer_name) :].lstrip(".")
        self.optimizer, self._group_number = home.optimizer, home.group

    @property
    def tensor(self) -> Tensor:
        """The weight as it is now: the parameter, or the differentiable view of it where attention
        stacks several.
        """
        kind = kind_of(self.layer)
        assert kind is not None
        return kind.weights(self.layer)[self.path]

    @property
    def gradient(self) -> Tensor | None:
        """The weight's part of its parameter's gradient, of the weight's shape."""
        weight = self.tensor
        owner = weight if weight._base is None else weight._base
        if owner is weight or owner.grad is None:
            return owner.grad
        first = weight.storage_offset() - owner.storage_offset()
        return owner.grad.reshape(-1)[first : first + weight.numel()].view(weight.shape)

    @property
    def group(self) -> dict[str, Any]:
        """The optimizer's parameter group; looked up, because ``optimizer.load_state_dict`` makes
        new ones.
        """
        return self.optimizer.param_groups[self._group_number]


def in_scope(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    only: Patterns | None,
    exclude: Patterns | None,
) -> list[DenseWeight]:
    """The trainable dense weights whose name or whose layer's name fits, in module order.

    Layers that `rewire.to_sparse` can cut. Raises ValueError if there are none, if one shares a
    parameter with another layer (a cut would untie them), if one is in no optimizer or in several
    groups, and for what the cut would refuse: a prune mask, a parametrization, a hook on the
    gradient, a forward that was assigned.
    """

    def within(names: Sequence[str]) -> bool:
        wanted = only is None or fits(names, only)
        return wanted and not (exclude is not None and fits(names, exclude))

    for name, module in model.named_modules():
        what = attached.disguised(module)
        if what is not None and within((name, join(name, "weight"))):
            raise ValueError(f"{name or 'the model'} {what}")
    found = []
    for name, layer_name, layer, weight in dense_weights(model):
        if weight.requires_grad and within((name, layer_name)):
            found.append((name, layer_name, layer, weight))
    if not found:
        raise ValueError(
            "there is no dense weight to act on: the method needs trainable layers of torch.nn "
            "(Linear, convolutions, "
            "RNN, GRU, LSTM, MultiheadAttention), and only= and exclude= must leave some of them"
        )
    layers = {layer_name: layer for _, layer_name, layer, _ in found}
    refuse_shared(model, layers)
    # the cut that ends the method would refuse them, after all the training
    for layer_name, layer in layers.items():
        kind = kind_of(layer)
        assert kind is not None
        attached.check_dense(layer_name, layer, kind)
        for path in attached.prune_masks(layer, kind):
            raise ValueError(
                f"{join(layer_name, path)} has a prune mask, and the method decides itself what "
                "stays: call torch.nn.utils.prune.remove(layer, name) first, or exclude the layer"
            )
    return [
        DenseWeight(name, at, layer, _home(name, w, optimizers)) for name, at, layer, w in found
    ]


def _home(name: str, weight: Tensor, optimizers: Sequence[Optimizer]) -> Home:
    owner = weight if isinstance(weight, nn.Parameter) else weight._base
    found = [optimizer for given in optimizers for optimizer in movers(given, owner)[:1]]
    return only_home(
        name,
        homes_of(owner, found),
        "from model.parameters()",
        ", freeze the weight, or exclude it",
    )


@torch.no_grad()
def largest(weights: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Masks of the share ``density`` of all entries together that is largest in magnitude (ties:
    the first).

    Cost: O(M log M) for M entries. At least one entry stays, but a single weight may end up empty.
    """
    flat = torch.cat([w.detach().reshape(-1).abs() for w in weights.values()])
    keep = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    count = budget.connections_of(density, flat.numel())
    keep[torch.sort(flat, descending=True, stable=True).indices[:count]] = True
    parts = keep.split([w.numel() for w in weights.values()])
    return {
        name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)
    }


class DenseStart(Method):
    """What methods share that train dense weights, in ``weights``, and cut them at the end."""

    density: float = parameter(
        default=0.05, above=0, high=1, help="share of the entries in scope that stays after the cut"
    )
    only: Patterns | None = parameter(
        default=None, help="names of the layers or weights to act on; None for all"
    )
    exclude: Patterns | None = parameter(
        default=None, help="names of the layers or weights to leave alone"
    )

    starts_dense = True
    keeps_budget = "no"
    memory = "O(M)"

    def _check(self) -> None:
        optimizers = listed(self.optimizer)
        self.weights = in_scope(self.model, optimizers, self.only, self.exclude)
        budget.connections_of(self.density, sum(w.tensor.numel() for w in self.weights))

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"weights": [weight.name for weight in self.weights]}

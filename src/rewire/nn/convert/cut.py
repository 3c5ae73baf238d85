"""Cut a dense model to the connections of masks: truly sparse layers, and optimizers that
follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewire.nn.convert import attached
from rewire.nn.convert.kinds import KINDS, Kind, join, kind_of
from rewire.nn.convert.replacing import layers_of, refuse_shared, swap
from rewire.nn.optimizers.followers import check_optimizer, reset_optimizer_state
from rewire.nn.optimizers.membership import split_state
from rewire.nn.optimizers.wrappers import listed
from rewire.nn.structure import Part, announce
from rewire.nn.weight.listing import sparse_weights
from rewire.nn.weight.pool import SparseWeight

__all__ = ["dense_weights", "to_sparse"]


@dataclass(frozen=True)
class _Cut:
    """A weight to cut, the parameter that contains it, and the connections that stay.

    first: place of the weight's first entry in the flattened parameter (attention stacks three
        weights in one parameter).
    kept: int64, ascending positions in the flattened weight.
    """

    path: str
    parameter: nn.Parameter
    shape: torch.Size
    first: int
    kept: Tensor


def to_sparse(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
) -> nn.Module:
    """Replace dense layers by sparse ones with exactly the connections of ``masks``, in place.

    Args:
        model: any model. If it is a layer to be replaced itself, use the module returned.
        masks: boolean tensors of the weights' shapes, by the name of the weight
            (``"fc1.weight"``, ``"lstm.weight_hh_l0"``, ``"attention.q_proj_weight"``) or, for
            layers of one weight, of the layer (``"fc1"``). True stays, even where the value is 0.
            A layer becomes sparse as a whole: its weights without a mask keep all connections. A
            weight with a mask of `torch.nn.utils.prune` uses that, and a mask given for it must be
            equal. None (the default) takes all layers with such prune masks.
        optimizers: those that train the model. The values of the sparse weight take the place of
            the dense parameter in its group, with state and gradient of the entries that stay, so
            training goes on as it would with the masked dense model. Every elementwise optimizer of
            `torch.optim` will do; Adafactor's factored second moment is multiplied out.

    Values, gradients and state are exact copies, with the slots in (row, column) order. Biases and
    all other parameters, a layer's hooks, and anything else set on it stay the objects they are. A
    weight of which nothing stays gets one empty slot, so its layer returns its bias.

    Returns the model. The layer types are those of `sparsify`. Raises ValueError, and leaves model
    and optimizers unchanged, for a name or shape that does not fit, a layer of another type (or
    with a parametrization), a weight that something else computes or whose gradient has a hook, a
    parameter that layers share, and an optimizer that cannot train sparse weights or keeps state of
    another shape. Cost: O(M) time.
    """
    optimizers = listed(optimizers)
    chosen = _chosen(model, masks)
    refuse_shared(model, {name: layer for name, (layer, _, _) in chosen.items()})
    cuts = [cut for _, _, weights in chosen.values() for cut in weights]
    moves = [move for o in optimizers for move in _moves(o, {id(cut.parameter) for cut in cuts})]
    values: dict[int, list[tuple[_Cut, nn.Parameter]]] = {}
    places = {name: set(kind.places(layer).values()) for name, (layer, kind, _) in chosen.items()}

    def sparse(name: str) -> nn.Module:
        layer, kind, weights = chosen[name]
        made = _twin(layer, kind)
        for cut in weights:
            pool = _pool(cut)
            parent, _, leaf = cut.path.rpartition(".")
            setattr(made.get_submodule(parent), leaf, pool)
            values.setdefault(id(cut.parameter), []).append((cut, pool.values))
        attached.move(made, layer, kind.plain(), places[name])
        return made

    model = swap(model, chosen, sparse, places)
    for move in moves:
        move.to(values[id(move.parameter)])
    pools = {id(weight.values): weight for _, weight in sparse_weights(model)}
    for parts in values.values():
        old = parts[0][0].parameter
        announce(old, [Part(new, partial(_taken, cut), pools[id(new)]) for cut, new in parts])
    return model


def dense_weights(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
    """The weights that `to_sparse` can cut: (name of the weight, of its layer, the layer, the
    weight).

    The weight is the parameter, or a view of it if `torch.nn.MultiheadAttention` stacks several.
    """
    for name, layer, kind in layers_of(model, kind_of):
        for path, weight in kind.weights(layer).items():
            yield join(name, path), name, layer, weight


def _chosen(
    model: nn.Module, masks: Mapping[str, Tensor] | None
) -> dict[str, tuple[nn.Module, Kind, list[_Cut]]]:
    """The layers that masks are for, with what stays of each weight; checks names and shapes."""
    found = {name: (layer, kind) for name, layer, kind in layers_of(model, kind_of)}
    pruned = {
        (name, path): mask
        for name, (layer, kind) in found.items()
        for path, mask in attached.prune_masks(layer, kind).items()
    }
    given = {} if masks is None else _given(model, masks, found)
    if not given and not (masks is None and pruned):
        raise ValueError(
            "there is no mask, so there is nothing to cut: give one for at least one weight"
            + (", or prune layers with torch.nn.utils.prune" if masks is None else "")
        )
    for key in given:
        if key in pruned and not torch.equal(given[key].to(pruned[key].device), pruned[key]):
            raise ValueError(
                f"the mask of {join(*key)} is not the prune mask that it has: leave masks= out to "
                "take that one, or call torch.nn.utils.prune.remove(layer, name) first"
            )
    chosen: dict[str, tuple[nn.Module, Kind, list[_Cut]]] = {}
    for name in dict.fromkeys(layer for layer, _ in (pruned if masks is None else given)):
        layer, kind = found[name]
        attached.check_dense(name, layer, kind)
        cuts = []
        for path, weight in kind.weights(layer).items():
            mask = given.get((name, path), pruned.get((name, path)))
            cuts.append(_cut(layer, kind, path, weight, mask))
        chosen[name] = layer, kind, cuts
    return chosen


def _given(
    model: nn.Module, masks: Mapping[str, Tensor], found: Mapping[str, tuple[nn.Module, Kind]]
) -> dict[tuple[str, str], Tensor]:
    """The masks by layer and weight."""
    weights = {
        (name, path): w
        for name, (layer, kind) in found.items()
        for path, w in kind.weights(layer).items()
    }
    names = {join(*key): key for key in weights}
    for name in found:
        own = [key for key in weights if key[0] == name]
        if len(own) == 1:
            names.setdefault(name, own[0])
    given: dict[tuple[str, str], Tensor] = {}
    for name, mask in masks.items():
        if name not in names:
            layer = name if name in dict(model.named_modules()) else name.rpartition(".")[0]
            what = attached.disguised(dict(model.named_modules()).get(layer, model))
            if what is not None:
                raise ValueError(f"{layer or 'the model'} {what}")
            raise ValueError(
                f"{name!r} is not a weight that can be cut: there are "
                f"{', '.join(map(repr, names)) or 'none'} (layers "
                f"{', '.join(kind.dense.__name__ for kind in KINDS)} of torch.nn themselves, "
                "without parametrization)"
            )
        key = names[name]
        if key in given:
            raise ValueError(f"two masks are for {join(*key)}: give one")
        shape = tuple(weights[key].shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            tensor = isinstance(mask, Tensor)
            got = f"{mask.dtype} {tuple(mask.shape)}" if tensor else type(mask).__name__
            raise ValueError(
                f"the mask of {name} must be a boolean tensor of shape {shape}, not {got}"
            )
        given[key] = mask
    return given


def _cut(layer: nn.Module, kind: Kind, path: str, weight: Tensor, mask: Tensor | None) -> _Cut:
    owner = attached.parameter(layer, kind, path)
    if mask is None:
        kept = torch.arange(weight.numel(), device=weight.device)
    else:
        kept = mask.reshape(-1).nonzero().flatten().to(weight.device)
    part = kind.part(layer, path, owner)
    first = 0 if part is owner else int(part.storage_offset() - owner.storage_offset())
    return _Cut(path, owner, weight.shape, first, kept)


def _pool(cut: _Cut) -> SparseWeight:
    """The sparse weight of what stays, in (row, column) order, with its part of the gradient."""
    columns = cut.shape[1:].numel()
    flat = cut.parameter.detach().reshape(-1)
    rows, cols = cut.kept // columns, cut.kept % columns
    capacity = max(cut.kept.numel(), 1)
    pool = SparseWeight.from_coo(
        cut.shape, rows, cols, flat[cut.first + cut.kept], capacity=capacity
    )
    if cut.parameter.grad is not None:
        pool.values.grad = _gather(cut, cut.parameter.grad)
    pool.values.requires_grad_(cut.parameter.requires_grad)
    return pool


def _gather(cut: _Cut, dense: Tensor) -> Tensor:
    """The entry for each slot of a tensor of the dense parameter's shape."""
    found = dense.detach().reshape(-1)[cut.first + cut.kept]
    return found if found.numel() else found.new_zeros(1)


def _taken(cut: _Cut, dense: Tensor) -> Tensor:
    """`_gather`, with 0 in the empty slot of a weight without connections."""
    return _gather(cut, dense) if cut.kept.numel() else dense.new_zeros(1)


def _twin(layer: nn.Module, kind: Kind) -> nn.Module:
    """The sparse layer with its settings and biases, and weights of one connection to be
    replaced.
    """
    device = next(layer.parameters()).device
    # What is drawn here is thrown away, and no other random numbers may depend on it.
    with contextlib.ExitStack() as stack:
        if device.type != "meta":
            devices = [] if device.type == "cpu" else [device]
            kinds = {} if device.type == "cpu" else {"device_type": device.type}
            stack.enter_context(torch.random.fork_rng(devices, **kinds))
        return kind.to_sparse(layer, dict.fromkeys(kind.weights(layer), 1), None)


# --- optimizers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Move:
    """A dense parameter in a group of an optimizer, and its state: tensors of the parameter's shape
    (``dense``), and the rest.
    """

    optimizer: Optimizer
    group: dict[str, Any]
    parameter: nn.Parameter
    dense: dict[str, Tensor]
    rest: dict[str, Any]

    def to(self, parts: list[tuple[_Cut, nn.Parameter]]) -> None:
        """Put the values of the sparse weights in the parameter's place."""
        members: list[Tensor] = self.group["params"]
        at = next(i for i, member in enumerate(members) if member is self.parameter)
        members[at : at + 1] = [values for _, values in parts]
        if "param_names" in self.group:
            names: list[str] = self.group["param_names"]
            layer, _, leaf = names[at].rpartition(".")
            # the name that torch.nn.utils.prune gave it
            own = join(layer, leaf.removesuffix("_orig"))
            new = [join(layer, cut.path) for cut, _ in parts] if len(parts) > 1 else [own]
            names[at : at + 1] = [f"{name}.values" for name in new]
        if self.parameter not in self.optimizer.state:
            return
        del self.optimizer.state[self.parameter]
        for cut, values in parts:
            state: dict[str, Any] = {k: _gather(cut, v) for k, v in self.dense.items()}
            # Each gets a copy of step counters and the like, because optimizers count in place.
            state |= {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.rest.items()}
            self.optimizer.state[values] = state
            if not cut.kept.numel():
                slot = torch.zeros(1, dtype=torch.int64, device=values.device)
                reset_optimizer_state(self.optimizer, values, slot)


def _moves(optimizer: Optimizer, parameters: set[int]) -> list[_Move]:
    """What to do to one optimizer; raises ValueError if that is impossible."""
    found = [
        _move(optimizer, group, parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in parameters
    ]
    if found:
        check_optimizer(optimizer)
    return found


def _move(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> _Move:
    state = dict(optimizer.state.get(parameter, {}))
    # Adafactor: the estimate that it would use for this matrix.
    if {"row_var", "col_var"} <= state.keys():
        row, col = state.pop("row_var"), state.pop("col_var")
        least = group["eps"][0] or torch.finfo(row.dtype).eps
        state["variance"] = row @ col / row.mean(-2, keepdim=True).clamp_(min=least)
    shape = parameter.shape
    dense, rest = split_state(
        optimizer,
        state,
        lambda key, value: value.shape == shape,
        f"a weight of shape {tuple(shape)}",
        ("cut", "the cut"),
    )
    return _Move(optimizer, group, parameter, dense, rest)

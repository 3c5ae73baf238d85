"""Make the layers of a model sparse, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewire.budget import Limits
from rewire.nn.convert import attached
from rewire.nn.convert.counts import Patterns, connection_counts, kept_by, matches
from rewire.nn.convert.kinds import KINDS, join, kind_of
from rewire.nn.convert.replacing import layers_of, refuse_shared, swap
from rewire.nn.layers.initial import Init, check_init
from rewire.nn.weight.listing import sparse_weights
from rewire.nn.weight.pool import SparseWeight
from rewire.topology import limits as limited

__all__ = ["sparsify"]


def sparsify(
    model: nn.Module,
    *,
    density: float | Mapping[str, float] | None = None,
    connections: int | Mapping[str, int] | None = None,
    distribution: str = "erk",
    only: Patterns | None = None,
    exclude: Patterns | None = None,
    select: Literal["random", "magnitude"] = "random",
    limits: Limits | Mapping[str, Limits] | None = None,
    generator: torch.Generator | None = None,
    init: Init = "auto",
) -> nn.Module:
    """Replace dense layers by sparse ones that keep within a budget, in place; returns the model.

    Args:
        density: share of the chosen layers' potential connections to have in total, spread by
            ``distribution``; or a dict from glob pattern to the density of each layer
            (``"encoder.lstm"``) or single weight (``"encoder.lstm.weight_hh_l0"``) it matches. The
            first match counts, layers without one stay dense. Where a layer of several weights is
            matched by its own name, ``distribution`` spreads its budget over them.
        connections: the same as a number of connections.
        distribution: a name in `rewire.budget.DISTRIBUTIONS` ("erk", "er", "uniform").
        only, exclude: glob patterns over layer names (``"encoder.*"``), one or several.
        select: "random" draws a random topology with fresh values, for training from scratch;
            "magnitude" keeps the largest weights and their values, for a trained model. Biases are
            kept in both.
        limits: on fan-in, fan-out and blocks of each weight (`rewire.budget.Limits`), or a dict
            from glob pattern to the limits of the layers or weights it matches. With
            select="random" only.
        generator: for the random draws.
        init: how large fresh values are: "auto" keeps the variance that outputs have in the dense
            layer, "dense" draws as that does, "sparse" goes by the mean fan-in; see
            `rewire.nn.layers.initial.draw_values`. With select="random" only.

    A weight with a mask of `torch.nn.utils.prune` gets the mask for its topology and the masked
    weights for its values, whatever ``select`` says, and is pruned no more. Without ``density`` and
    ``connections`` only layers with such masks are converted (their other weights stay complete). A
    budget beside masks must agree with them: other layers get what the masks leave of it. To choose
    anew, make the masks permanent first (`torch.nn.utils.prune.remove`).

    What else belongs to a layer stays with it: biases (the same parameters), hooks, mode, whatever
    was set on it. A layer whose weight is computed (parametrizations, weight norm, spectral norm),
    has a hook on its gradient, or has a forward of its own is refused by name.

    Layers converted: `torch.nn.Linear`, `Conv1d`, `Conv2d`, `Conv3d`, `RNN`, `LSTM`, `GRU` and
    `MultiheadAttention` themselves (not subclasses, whose forward may differ). Make the optimizer
    afterwards: the old parameters are gone. Transformer encoders stop using nested tensors, which
    their fused kernels for dense weights need. Raises ValueError if nothing matches, the budget
    cannot be met or a parameter to be replaced is shared with another layer; the model is then
    unchanged.
    """
    if density is not None and connections is not None:
        raise ValueError("give exactly one of density= and connections=")
    if select not in ("random", "magnitude"):
        raise ValueError(f"select must be 'random' or 'magnitude', not {select!r}")
    if limits is not None and select != "random":
        raise ValueError("limits= are for select='random': the largest weights need not fit them")
    check_init(init)
    if init != "auto" and select != "random":
        raise ValueError(
            f"init={init!r} is for select='random': the largest weights keep their values"
        )
    found = {
        name: (module, kind)
        for name, module, kind in layers_of(model, kind_of)
        if (only is None or matches(name, only))
        and not (exclude is not None and matches(name, exclude))
    }
    _refuse_disguised(model, only, exclude, density if density is not None else connections)
    masks = {name: attached.prune_masks(module, kind) for name, (module, kind) in found.items()}
    if density is None and connections is None:
        found = {name: layer for name, layer in found.items() if masks[name]}
        if not found:
            raise ValueError(
                "give exactly one of density= and connections=: no layer has a prune mask to take "
                "instead"
            )
    weights = {name: kind.weights(module) for name, (module, kind) in found.items()}
    for name, path, weight in ((n, p, w) for n, parts in weights.items() for p, w in parts.items()):
        if not weight.numel():
            raise ValueError(
                f"{join(name, path)} has the shape {tuple(weight.shape)}, with nothing to connect: "
                "exclude it"
            )
    if density is None and connections is None:
        counts = {
            name: {p: kept_by(masks[name].get(p), w) for p, w in parts.items()}
            for name, parts in weights.items()
        }
    else:
        counts = connection_counts(weights, density, connections, distribution, masks)
    if not counts:
        kinds = ", ".join(kind.dense.__name__ for kind in KINDS)
        raise ValueError(
            f"no layer to convert: sparsify converts layers of torch.nn ({kinds}), and only=, "
            "exclude= or the patterns of the budget leave none of them"
        )
    refuse_shared(model, {name: found[name][0] for name in counts})
    for name in counts:
        attached.check_dense(name, *found[name])
        meta = next((p for p, w in weights[name].items() if w.device.type == "meta"), None)
        if meta is not None and select == "magnitude":
            raise ValueError(
                f"{join(name, meta)} is on the meta device, where no value is the largest: load it "
                "first"
            )
    if isinstance(limits, Mapping):
        names = {
            name
            for layer in counts
            for path in weights[layer]
            for name in (layer, join(layer, path))
        }
        for pattern in limits:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"pattern {pattern!r} of limits= matches no layer; there are "
                    f"{', '.join(counts)}"
                )

    def sparse(name: str) -> nn.Module:
        layer, kind = found[name]
        made = kind.to_sparse(
            layer, {path: max(count, 1) for path, count in counts[name].items()}, generator
        )
        drawn = [path for path in weights[name] if path not in masks[name]]
        _restrict(made, name, drawn, limits, generator, {})
        # made with the default; or other rows have more connections by now
        if init != "auto" or limits is not None:
            redrawn: Any = made
            redrawn.reset_weights(generator, init=init)
        for path, dense in weights[name].items():
            parent, _, leaf = path.rpartition(".")
            pool = None
            if path in masks[name]:
                pool = _masked(
                    kind.part(layer, path, attached.parameter(layer, kind, path)), masks[name][path]
                )
            elif select == "magnitude" or density is connections is None:
                pool = SparseWeight.from_dense(dense, connections=counts[name][path])
            if pool is not None:
                setattr(made.get_submodule(parent), leaf, pool)
        _restrict(made, name, masks[name], limits, generator, masks[name])
        for path in weights[name]:
            trained = attached.parameter(layer, kind, path).requires_grad
            made.get_parameter(f"{path}.values").requires_grad_(trained)
        attached.move(made, layer, kind.plain(), set(kind.places(layer).values()))
        return made

    places = {name: set(found[name][1].places(found[name][0]).values()) for name in counts}
    model = swap(
        model,
        counts,
        sparse,
        lambda name, made: attached.settle(made, found[name][0], places[name]),
    )
    for module in model.modules():
        # An encoder asks its first layer alone whether nested tensors will do, and they do for
        # dense layers only.
        if isinstance(module, nn.TransformerEncoder) and any(True for _ in sparse_weights(module)):
            module.use_nested_tensor = False
    return model


def _restrict(
    made: nn.Module,
    layer: str,
    paths: Iterable[str],
    limits: Limits | Mapping[str, Limits] | None,
    generator: torch.Generator | None,
    masks: Mapping[str, Tensor],
) -> None:
    """Give the pools of a layer that was just made the limits that are meant for them."""
    for path in paths:
        both = layer, join(layer, path)
        if isinstance(limits, Mapping):
            own = next(
                (
                    w
                    for pattern, w in limits.items()
                    if any(fnmatchcase(name, pattern) for name in both)
                ),
                None,
            )
        else:
            own = limits
        pool = made.get_submodule(path)
        if own is not None and isinstance(pool, SparseWeight):
            broken = (
                limited.violation(pool.index, *pool.matrix_shape, own) if path in masks else None
            )
            if broken:
                raise ValueError(f"the prune mask of {both[1]} does not keep the limits: {broken}")
            try:
                pool.restrict(own, generator)
            except ValueError as error:
                raise ValueError(f"{both[1]}: {error}") from None


def _refuse_disguised(
    model: nn.Module, only: Patterns | None, exclude: Patterns | None, given: Any
) -> None:
    """A layer that is meant but has become of another type must not stay dense in silence."""
    for name, module in model.named_modules():
        what = attached.disguised(module)
        meant = what is not None and (only is None or matches(name, only))
        if isinstance(given, Mapping):
            meant = meant and any(
                fnmatchcase(n, p) for n in (name, join(name, "weight")) for p in given
            )
        if meant and given is not None and not (exclude is not None and matches(name, exclude)):
            raise ValueError(f"{name or 'the model'} {what}")


def _masked(weight: Tensor, mask: Tensor) -> SparseWeight:
    """A pool of the entries of ``weight`` where ``mask`` is true; of one empty slot if it is
    nowhere.
    """
    kept = mask.reshape(-1).nonzero().flatten()
    columns = weight.shape[1:].numel()
    values = weight.detach().reshape(-1)[kept]
    return SparseWeight.from_coo(
        weight.shape, kept // columns, kept % columns, values, capacity=max(kept.numel(), 1)
    )
